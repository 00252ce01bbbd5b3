"""Write the embedded data: a task with worked answers, graded by exact match, and a plain text for perplexity.

    python demo/make_data.py --output demo/data

`task/{train,validation,test}.jsonl` hold questions about somebody who gets and loses things, one line each:
{"prompt": question, "completion": worked answer}. The prompt ends with a line break, and the worked answer ends with
"#### " and the result, as in GSM8K; whoever loads it adds the end-of-text token.

`text/{train,validation,test}.jsonl` hold entries of an invented ship's log, one line each: {"text": entry}.

The splits are disjoint by construction. What makes an example the same as another is written down as a key: for a
question, its chain of numbers and signs ("7+5-3", whoever owns whatever); for an entry, the facts it reports. The
key's SHA-256 alone decides the split, so a key can be in one split only, and each key is used at most once. A test
question therefore asks for a sum that no training question asks for, not even in other words.

Everything follows from `--seed`: the same seed writes the same bytes.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

TASK_SPLITS = {"train": 4400, "validation": 200, "test": 200}
TEXT_SPLITS = {"train": 900, "validation": 100, "test": 100}

LARGEST = 9  # no number in a question or in its answer exceeds this
OPERATIONS = 3
# Each word below is two tokens of the embedded tokenizer and each number is one digit, so that all questions are
# equally long. A model that never learned to copy can then find the numbers by their place, within a minute's tuning.

NAMES = ["Ada", "Ben", "Kim", "Lee", "Max", "Sam", "Ted", "Tom"]
THINGS = ["blocks", "keys", "lists", "notes", "points", "texts", "units", "words"]
GAINS = ["adds", "buys", "finds", "gets"]
LOSSES = ["gives", "loses", "uses"]


def split_of(key: str) -> str:
    """Return the split that examples with this key belong to."""
    part = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if part < 80 else "validation" if part < 90 else "test"


def make_question(source: random.Random) -> tuple[str, dict[str, str]]:
    """Return the key and the example of one random question: a start, then gains and losses."""
    total = source.randint(2, LARGEST)
    key, steps = str(total), []
    clauses = [f"{source.choice(NAMES)} has {total} {source.choice(THINGS)}"]
    for _ in range(OPERATIONS):
        gain = total == 0 or (total < LARGEST and source.random() < 0.5)
        amount = source.randint(1, LARGEST - total if gain else total)
        after = total + amount if gain else total - amount
        sign = "+" if gain else "-"
        key += f"{sign}{amount}"
        clauses.append(f"{source.choice(GAINS if gain else LOSSES)} {amount}")
        steps.append(f"{total}{sign}{amount}={after}")
        total = after
    prompt = ", ".join(clauses) + ". How many?\n"
    return key, {"prompt": prompt, "completion": "\n".join([*steps, f"#### {total}"])}


SHIPS = ["the Albatross", "the Marigold", "the Kittiwake", "the Morning Star", "the Patience"]
MONTHS = ["March", "April", "May", "June", "July", "August", "September", "October"]
QUARTERS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
# Each strength of wind comes with the sea, the sails and the mood that go with it, so that an entry hangs together.
WINDS = {
    "calm": (
        ["The sea is flat as glass.", "Hardly a ripple on the water."],
        ["All sail set and no use for it.", "Sails hanging idle."],
        ["The crew are bored.", "The men fish over the side."],
    ),
    "light": (
        ["A gentle swell.", "The sea is smooth."],
        ["Set every sail we have.", "Topsails and royals set."],
        ["The crew are cheerful.", "Somebody sings on the foredeck."],
    ),
    "fresh": (
        ["White horses all round us.", "A lively sea."],
        ["Topsails set, royals taken in.", "Good speed under plain sail."],
        ["The crew are busy and content.", "No time for songs today."],
    ),
    "strong": (
        ["High waves and much spray.", "The decks are wet from end to end."],
        ["Took in two reefs.", "Reefed topsails only."],
        ["The crew are tired.", "Nobody has slept much."],
    ),
    "stormy": (
        ["Mountainous seas.", "Waves break over the bow."],
        ["Running under bare poles.", "Only the storm sail holds."],
        ["The crew are frightened but steady.", "All hands on deck since midnight."],
    ),
}
SKIES = ["Clear sky", "Low cloud", "Thick fog", "Steady rain", "Passing showers", "A pale sun"]
PLACES = ["Cape Farewell", "Gull Island", "the Skerries", "Anchor Bay", "Long Point", "the Black Rocks"]
SIGHTS = ["a whale", "three dolphins", "a drifting cask", "a fishing boat", "a flock of terns", "an empty raft"]
HOURS = ["at dawn", "before noon", "at noon", "in the afternoon", "at dusk", "during the night"]
MEALS = ["pea soup", "salt pork", "fresh cod", "ship's biscuit", "barley broth", "the last of the onions"]
REPAIRS = ["the foremast", "the pump", "a torn jib", "the rudder chain", "the galley stove", "the long boat"]


def make_entry(source: random.Random) -> tuple[str, dict[str, str]]:
    """Return the key and the example of one random entry of a ship's log."""
    ship, day, month = source.choice(SHIPS), source.randint(1, 30), source.choice(MONTHS)
    wind, quarter, sky = source.choice(sorted(WINDS)), source.choice(QUARTERS), source.choice(SKIES)
    sea, sails, mood = (source.choice(choices) for choices in WINDS[wind])
    place, sight, hour, meal, repair = (source.choice(list_) for list_ in (PLACES, SIGHTS, HOURS, MEALS, REPAIRS))
    weather = f"{sky}, no wind." if wind == "calm" else f"{sky}, wind {wind} from the {quarter}."
    events = [
        f"Passed {place} {hour}.",
        f"Saw {sight} {hour}.",
        f"The carpenter mended {repair}.",
        f"The cook served {meal}.",
    ]
    chosen = source.sample(events, 2)
    sentences = [f"{day} {month}, aboard {ship}.", weather, sea, sails, *chosen, mood]
    key = "|".join(sorted(sentences))
    return key, {"text": " ".join(sentences)}


def make_splits(
    make: Callable[[random.Random], tuple[str, dict[str, str]]], sizes: dict[str, int], seed: int
) -> dict[str, list[dict[str, str]]]:
    """Return `sizes` examples for each split, in random order, no two of them with the same key."""
    source = random.Random(seed)
    used: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in sizes}
    while any(len(splits[name]) < size for name, size in sizes.items()):
        key, example = make(source)
        split = split_of(key)
        if key not in used and len(splits[split]) < sizes[split]:
            used.add(key)
            splits[split].append(example)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind, make, sizes in (("task", make_question, TASK_SPLITS), ("text", make_entry, TEXT_SPLITS)):
        folder = options.output / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, examples in make_splits(make, sizes, options.seed).items():
            lines = "".join(json.dumps(example) + "\n" for example in examples)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
