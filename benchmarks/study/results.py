"""Stored runs, arranged in cells: one task under one condition, scores by method and seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .conditions import TEST_CONDITIONS
from .config import Config
from .data import MARKS, family
from .measures import Array, epochs_to
from .statistics import Scores
from .store import Row, number

Runs = dict[str, dict[int, Row]]  # by method and seed


@dataclass
class Cell:
    """One task, and what it was trained or tested under.

    Attributes:
        data: The task.
        condition: Of training, or, with ``tested``, of testing a network trained on clean data.
        tested: Whether the condition is one of testing.
        scores: By method and seed.
    """

    data: str
    condition: str
    tested: bool
    scores: dict[str, Scores] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As the tables name it."""
        return f"{self.condition} at test" if self.tested else self.condition


def gather(configs: Iterable[Config], rows: dict[str, Row]) -> dict[tuple[str, str], Runs]:
    """Finished runs by task and training condition."""
    found: dict[tuple[str, str], Runs] = {}
    for config in configs:
        runs = found.setdefault((config.data, config.condition), {})
        if config.key in rows:
            runs.setdefault(config.method, {})[config.seed] = rows[config.key]
    return {key: runs for key, runs in found.items() if runs}


def cells(found: dict[tuple[str, str], Runs]) -> list[Cell]:
    """Cells task by task, each task's clean one followed by those of testing."""
    result = []
    tasks = list(dict.fromkeys(data for data, _ in found))
    for (data, condition), runs in sorted(found.items(), key=lambda item: tasks.index(item[0][0])):
        result.append(Cell(data, condition, False, measure(runs, "score")))
        if condition == "clean":
            result += [Cell(data, name, True, measure(runs, name)) for name in TEST_CONDITIONS]
    return result


def measure(runs: Runs, name: str) -> dict[str, Scores]:
    """A measure by method and seed, where it was taken."""
    values = {
        method: {seed: number(row, name) for seed, row in by_seed.items() if row[name]}
        for method, by_seed in runs.items()
    }
    return {method: scores for method, scores in values.items() if scores}


def probes(runs: Runs, method: str) -> dict[str, Scores]:
    """Probe of each modality's encoder, by modality and seed."""
    found: dict[str, dict[int, float]] = {}
    for seed, row in runs[method].items():
        for part in row["probes"].split():
            name, _, value = part.partition("=")
            found.setdefault(name, {})[seed] = float(value)
    return dict(found)


def curve(row: Row, name: str) -> Array:
    """A measure after every epoch."""
    return np.array([float(x) for x in row[name].split()])


def epochs_to_baseline(runs: Runs, method: str, share: float = 0.95) -> Scores:
    """Epochs to reach a share of the final score of ``uniform`` at the same seed."""
    return {
        seed: epochs_to(
            curve(row, "curve"),
            share * number(runs["uniform"][seed], "score"),
            MARKS[family(row["data"])],
        )
        for seed, row in runs[method].items()
        if seed in runs["uniform"]
    }
