"""A comparison of score tables (``comparison.json``) as tables for people: the terminal's and the report's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = tuple[list[str], list[list[str]]]
"""Column names, and the rows below them."""

MOST_COMPARED = 4
"""Score tables of which every pair is shown; of more, each with the first."""
FIGURES = ("split_half", "split_half_beyond_norm", "norm_agreement", "signal_to_noise")
MEASURES = {"spearman": "Spearman", "kendall": "Kendall", "partial": "beyond ‖w‖", "overlap": "top tenth"}


def trust_rows(value: Mapping[str, Any]) -> Rows:
    """What each score table says of itself: its cost, and how far to trust it."""
    columns = ["scores", "passes", "time", "memory", "stability", "beyond ‖w‖", "like ‖w‖", "signal/noise"]
    return columns, [
        [
            table["name"],
            f"{table['forward_passes']:,} + {table['backward_passes']:,}",
            "-" if table["seconds"] is None else f"{table['seconds']:,.1f} s",
            "-" if table["peak_memory"] is None else f"{table['peak_memory'] / 2**20:,.0f} MiB",
            *(_number(table[name]) for name in FIGURES),
        ]
        for table in value["tables"]
    ]


def pair_rows(value: Mapping[str, Any]) -> Rows:
    """How far each pair agrees: median over modules / all their rows (or columns) as one ranking."""
    reference = value["tables"][0]["name"] if len(value["tables"]) > MOST_COMPARED else None
    return ["pair", *MEASURES.values()], [
        [
            f"{pair['first']} ~ {pair['second']}",
            *(f"{_number(pair['median'][name])} / {_number(pair['overall'][name])}" for name in MEASURES),
        ]
        for pair in value["pairs"]
        if reference in (None, pair["first"])
    ]


def pair_sentences(value: Mapping[str, Any]) -> list[str]:
    """In words how the first score table agrees with each other one."""
    return [
        f"{pair['second']} agrees with {pair['first']} at Spearman {pair['median']['spearman']:z.2f}, "
        f"{pair['median']['partial']:z.2f} beyond the weight norm: {_meaning(**pair['median'])}."
        for pair in value["pairs"]
        if pair["first"] == value["tables"][0]["name"] and len(value["tables"]) > 1
    ]


def _meaning(spearman: float, partial: float, **_: float) -> str:
    if spearman > 0.3 and partial < 0.5 * spearman:
        return "what they share is mostly the size of the weights"
    return "they rank much alike" if partial > 0.6 else "they rank differently"


def notes(value: Mapping[str, Any]) -> list[str]:
    """A verdict on each score table, and what makes the comparison unfair."""
    lines = [f"{table['name']}: {table['verdict']}" for table in value["tables"]]
    if len({table["data_fingerprint"] for table in value["tables"]} - {""}) > 1:
        lines.append("note: these scores are of different data, which makes them differ too")
    if len({len(pair["modules"]) for pair in value["pairs"]}) > 1:
        lines.append("note: not all have the same modules; each pair is compared on those that both have")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"
