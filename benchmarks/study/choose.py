"""Choose each method's setting from the tuning runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .config import Config
from .methods import METHODS
from .results import Cell, cells, gather
from .statistics import estimate
from .store import Row


def choose(tuning: Sequence[Config], rows: dict[str, Row], path: Path) -> list[dict[str, str]]:
    """Write, for every value of every grid, its mean score over the tuning cells.

    The value with the largest is chosen. Every task counts alike, and in it every
    condition of training, and those of testing together as one more.
    """
    table = []
    for method, entry in METHODS.items():
        scores = {}
        for value in entry.grid:
            wanted = [c for c in tuning if (c.method, c.setting) == (method, value)]
            if wanted and all(config.key in rows for config in wanted):
                scores[value] = _mean_score(cells(gather(wanted, rows)), method)
        if len(scores) == len(entry.grid) > 0:
            best = max(scores, key=lambda value: scores[value])
            table += [
                {
                    "method": method,
                    "setting": entry.setting,
                    "value": str(value),
                    "score": f"{score:.2f}",
                    "chosen": "yes" if value == best else "no",
                }
                for value, score in scores.items()
            ]
    if not table:
        raise ValueError("choose: expected the finished runs of suite tuning, found none")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return table


def _mean_score(found: Sequence[Cell], method: str) -> float:
    parts: dict[tuple[str, str], list[float]] = {}
    for cell in found:
        part = "testing" if cell.tested else cell.condition
        parts.setdefault((cell.data, part), []).append(estimate(cell.scores[method]).mean)
    return float(np.mean([np.mean(values) for values in parts.values()]))
