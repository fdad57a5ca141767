"""What is wrong with the training data, and what goes wrong at test time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import SPOKEN, Split, load, standardise

Rng = np.random.Generator
Change = Callable[[Split, Rng], Split]
# Inputs and, where something is absent, the mask of what is present.
Corrupted = tuple[dict[str, Tensor], Tensor | None]


def _unchanged(split: Split, rng: Rng) -> Split:
    return split


@dataclass(frozen=True)
class Condition:
    """How training differs from training on all of the clean data.

    Attributes:
        select: Picks training samples, before inputs are standardised.
        spoil: Spoils labels or inputs, after.
        epochs: Factor of the number of epochs.
    """

    select: Change = _unchanged
    spoil: Change = _unchanged
    epochs: int = 1


def small(split: Split, rng: Rng, size: int) -> Split:
    """``size`` random training samples."""
    return split.take(torch.from_numpy(rng.permutation(len(split.truth))[:size]))


def imbalanced(split: Split, rng: Rng, ratio: float) -> Split:
    """Class sizes that fall geometrically, the last to ``1 / ratio`` of the first."""
    truth = _classes(split).numpy()
    smallest = np.bincount(truth).min()
    kept = []
    for c in range(split.num_classes):
        size = round(smallest * ratio ** (-c / (split.num_classes - 1)))
        kept.append(rng.permutation(np.flatnonzero(truth == c))[:size])
    return split.take(torch.from_numpy(np.concatenate(kept)))


def symmetric(split: Split, rng: Rng, share: float) -> Split:
    """A share of the samples get another random sample's target (by chance their own)."""
    hit = rng.permutation(len(split.truth))[: round(share * len(split.truth))]
    target = split.truth.clone()
    target[hit] = split.truth[torch.from_numpy(rng.integers(len(target), size=len(hit)))]
    return replace(split, target=target)


def asymmetric(split: Split, rng: Rng, share: float) -> Split:
    """A share of the samples of class c are labelled c + 1."""
    target = _classes(split).clone()
    hit = torch.from_numpy(rng.permutation(len(target))[: round(share * len(target))])
    target[hit] = (target[hit] + 1) % split.num_classes
    return replace(split, target=target)


def corrupted(split: Split, rng: Rng, share: float) -> Split:
    """A share of the inputs of one random modality are noise."""
    name = split.modalities[rng.integers(len(split.modalities))]
    x = split.train[name].clone()
    hit = rng.permutation(len(x))[: round(share * len(x))]
    x[hit] = torch.from_numpy(rng.standard_normal((len(hit), *x.shape[1:]))).float()
    return replace(split, train={**split.train, name: x})


CONDITIONS: dict[str, Condition] = {
    "clean": Condition(),
    "symmetric-20": Condition(spoil=partial(symmetric, share=0.2)),
    "symmetric-40": Condition(spoil=partial(symmetric, share=0.4)),
    "asymmetric-30": Condition(spoil=partial(asymmetric, share=0.3)),
    "corrupted-30": Condition(spoil=partial(corrupted, share=0.3)),
    "small-300": Condition(select=partial(small, size=300)),
    "small-100": Condition(select=partial(small, size=100)),
    "imbalanced-20": Condition(select=partial(imbalanced, ratio=20.0)),
    "long": Condition(epochs=4),
}


def prepare(data: str, condition: str, seed: int, spoken: Path = SPOKEN) -> Split:
    """The data that every method gets under a condition, standardised."""
    rng = np.random.default_rng([seed, 1])
    chosen = CONDITIONS[condition]
    split = standardise(chosen.select(load(data, seed, spoken), rng))
    return chosen.spoil(split, rng)


def noise(test: dict[str, Tensor], hit: Tensor, rng: Rng, sigma: float) -> Corrupted:
    """Noise of ``sigma`` training deviations on the modality that was hit."""
    other = {
        name: x + sigma * torch.from_numpy(rng.standard_normal(x.shape)).float()
        for name, x in test.items()
    }
    return _replace(test, hit, other), None


def swap(test: dict[str, Tensor], hit: Tensor, rng: Rng, share: float) -> Corrupted:
    """For a share of the samples, the modality that was hit is another sample's."""
    order = torch.from_numpy(rng.permutation(len(hit)))
    return _replace(test, _some(hit, rng, share), {k: x[order] for k, x in test.items()}), None


def absent(test: dict[str, Tensor], hit: Tensor, rng: Rng, share: float) -> Corrupted:
    """For a share of the samples, the modality that was hit is absent."""
    return test, torch.arange(len(test)) != _some(hit, rng, share).unsqueeze(1)


TEST_CONDITIONS: dict[str, Callable[[dict[str, Tensor], Tensor, Rng], Corrupted]] = {
    "noise-1": partial(noise, sigma=1.0),
    "noise-2": partial(noise, sigma=2.0),
    "noise-4": partial(noise, sigma=4.0),
    "swap-50": partial(swap, share=0.5),
    "swap-100": partial(swap, share=1.0),
    "absent-50": partial(absent, share=0.5),
    "absent-100": partial(absent, share=1.0),
}


def corrupt_test(name: str, test: dict[str, Tensor], seed: int) -> Corrupted:
    """Corrupt one random modality of every test sample; which one depends on the seed alone."""
    rng = np.random.default_rng([seed, 2])
    size = len(next(iter(test.values())))
    hit = torch.from_numpy(rng.integers(len(test), size=size))
    return TEST_CONDITIONS[name](test, hit, rng)


def _classes(split: Split) -> Tensor:
    if split.truth.is_floating_point():
        raise ValueError("condition: expected a task with classes, got a regression")
    return split.truth


def _some(hit: Tensor, rng: Rng, share: float) -> Tensor:
    """Keep a share of the hits; -1 hits nothing."""
    return torch.where(torch.from_numpy(rng.random(len(hit)) < share), hit, -1)


def _replace(test: dict[str, Tensor], hit: Tensor, other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.where((hit == m).view(-1, *[1] * (x.dim() - 1)), other[name], x)
        for m, (name, x) in enumerate(test.items())
    }
