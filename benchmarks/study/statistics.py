"""Means, intervals, paired differences and ranks over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Scores = Mapping[int, float]  # by seed


class Estimate(NamedTuple):
    """A mean, the half width of its 95% interval (Student's t), and the number of seeds."""

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half


def estimate(scores: Scores) -> Estimate:
    """Of the mean over seeds; the interval of a single seed is infinite."""
    from scipy.stats import t  # the extra "study"

    values = np.array(list(scores.values()))
    count = len(values)
    if count < 2:
        return Estimate(float(values.mean()), float("inf"), count)
    half = t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
    return Estimate(float(values.mean()), float(half), count)


def difference(first: Scores, second: Scores) -> Estimate:
    """Of ``first - second``, over the seeds that both have."""
    return estimate({seed: first[seed] - second[seed] for seed in first if seed in second})


def best(scores: Mapping[str, Scores]) -> str:
    """The method with the largest mean."""
    return max(scores, key=lambda name: estimate(scores[name]).mean)


def ranks(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Rank of each method's mean, 1 the largest, ties averaged."""
    means = {name: estimate(values).mean for name, values in scores.items()}
    return {
        name: 0.5
        + sum(other > mean for other in means.values())
        + 0.5 * sum(other == mean for other in means.values())
        for name, mean in means.items()
    }
