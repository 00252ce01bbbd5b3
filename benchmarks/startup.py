"""CPU time of ``import rowscope`` and ``rowscope --help``, beside that of an empty Python, interleaved, medians.

    python benchmarks/startup.py [--repeats 9]

The promise is at most 0.2 s for the import and 0.3 s for the help; the empty interpreter is printed for scale.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import rowscope": ["-c", "import rowscope"],
    "rowscope --help": ["-m", "rowscope", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User plus system time of one child process."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_seconds(arguments))
    print(json.dumps({name: round(statistics.median(values), 3) for name, values in times.items()}, indent=2))


if __name__ == "__main__":
    main()
