"""The run folder: what is written where, and that a run is resumed, locked and refused properly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .records import checked_output, read_json, read_yaml, write_json, write_text, write_yaml


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    import platform
    from importlib import metadata

    packages = ("rowscope", "torch", "transformers", "peft", "trl", "torch-pruning", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run folder (DESIGN: files); creating one refuses to touch an older run.

    Attributes:
        root: the folder.
        writes: whether this process writes. Of several that share a run, only the first does.
    """

    root: Path
    writes: bool = True

    @classmethod
    def create(cls, root: Path, *, resume: bool = False) -> RunFolder:
        """Make the folder. Raises InputError if it already holds something and `resume` is not asked for."""
        if root.exists() and not root.is_dir():
            raise InputError(f"{root} is a file: name a folder with --output-dir")
        run = cls(root)
        if root.is_dir() and any(root.iterdir()):
            if not resume:
                raise InputError(f"{root} is not empty: add --resume to continue it, or name another --output-dir")
            if not any(path.exists() for path in (run.config, run.run, run.graph, run.scores, run.selection)):
                raise InputError(f"{root} holds other things than a run: name another --output-dir")
        checked_output(run.run)
        root.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def next_free(cls, method: str, model: str, parent: Path = Path("runs")) -> RunFolder:
        """Make ``runs/<method>-<model>-<n>`` with the smallest free n."""
        stem = f"{method}-{Path(model).name}"
        number = 1
        while (parent / f"{stem}-{number}").exists():
            number += 1
        return cls.create(parent / f"{stem}-{number}")

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def graph(self) -> Path:
        return self.root / "graph.json"

    @property
    def scores(self) -> Path:
        return self.root / "scores.safetensors"

    @property
    def selection(self) -> Path:
        return self.root / "selection.safetensors"

    @property
    def memory(self) -> Path:
        return self.root / "memory.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def keep_config(self, settings: dict[str, Any]) -> None:
        """Write config.yaml. Raises InputError if the run was started with other settings, which it lists."""
        if self.config.is_file():
            before = read_yaml(self.config)
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                listed = ", ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
                raise InputError(f"{self.root} was started otherwise ({listed}): use that, or another --output-dir")
        write_yaml(self.config, settings)

    @contextmanager
    def recorded(self, command: list[str], method: str, seed: int, device: str) -> Iterator[dict[str, Any]]:
        """Yield the content of run.json to be filled in; on disk its status is ``running`` until the end.

        Then it is ``finished``, or ``interrupted`` if anything was raised. Other processes are kept out.
        """
        record: dict[str, Any] = {
            "status": "running",
            "command": command,
            "method": method,
            "schedule": "none",
            "base": "full",
            "seed": seed,
            "device": device,
            "versions": versions(),
            "timings": {},
        }
        with self._locked() if self.writes else nullcontext():
            yield from self._record_status(record)

    def _record_status(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._write_record(record)
        try:
            yield record
            record["status"] = "finished"
        except BaseException:
            record["status"] = "interrupted"
            raise
        finally:
            self._write_record(record)

    def _write_record(self, record: dict[str, Any]) -> None:
        if self.writes:
            write_json(self.run, record)

    def is_finished(self) -> bool:
        """Whether the run ended well and its adapter is still there."""
        record = read_json(self.run) if self.run.is_file() else {}
        whole = record.get("status") == "finished" and "result" in record and "total_parameters" in record
        return whole and (self.adapter / "adapter_config.json").is_file()

    @contextmanager
    def removed_if_refused(self, is_new: bool) -> Iterator[None]:
        """A run that is refused before it has a checkpoint leaves no folder behind, if the folder was new."""
        try:
            yield
        except InputError:
            if self.writes and is_new and not self.checkpoints.exists():
                shutil.rmtree(self.root)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out; the lock goes with the process, however it ends."""
        with open(self.root / ".lock", "w") as lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows has no such lock
                pass
            except BlockingIOError:
                raise InputError(f"{self.root} is in use by another process: wait, or name another") from None
            yield

    def score_tables(self) -> list[Path]:
        """All score files of the run: the one that selected first, then ``scores-*.safetensors`` by name."""
        first = [self.scores] if self.scores.is_file() else []
        return first + sorted(self.root.glob("scores-*.safetensors"))

    def append_log(self, line: dict[str, Any]) -> None:
        """Append one JSON line to ``log.jsonl``."""
        if not self.writes:
            return
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Lines of ``log.jsonl``; a last line that was cut off by a crash is left out."""
        lines = []
        texts = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        for text in texts:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
        return lines

    def rewind_log(self, step: int) -> None:
        """Drop log lines after `step`, before a run resumes from its checkpoint at that step."""
        kept = [line for line in self.read_log() if line.get("step", 0) <= step]
        write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept))
