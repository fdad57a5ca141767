"""Tasks drawn at random: what nobody thought of when definitions were chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH = 8  # of what a sample is, before each modality shows it in its own way
TEST = 2000

Array = NDArray[Any]


class Drawn(NamedTuple):
    """A task and its samples.

    Attributes:
        inputs: By modality, ``[N, D]``; the last ``TEST`` are to test on.
        label: ``[N]``.
        classes: Number of classes.
        hidden: Units of the hidden layer that the fused head has; 0 for a linear one.
    """

    inputs: dict[str, Array]
    label: Array
    classes: int
    hidden: int


def draw(rng: np.random.Generator) -> Drawn:
    """Draw a task: two to five modalities, 2 to 50 classes, 300 to 2,000 training samples.

    Each class has a random centre. A modality shows it with a strength of its own, in one of five
    cases none, under variation of its own and, in half of the tasks, variation that all have in
    common; through a random mixture that saturates in half of the cases, with noise. In three of
    ten tasks, the class is the sum of what the first two show, of which each alone tells nothing.
    """
    modalities = int(rng.integers(2, 6))
    together = rng.random() < 0.3
    classes = int(rng.choice([2, 3, 4] if together else [2, 3, 5, 10, 20, 50]))
    size = int(rng.choice([300, 1000, 2000])) + TEST
    parts = rng.integers(classes, size=(2, size))
    label = parts.sum(axis=0) % classes if together else parts[0]
    centres = rng.standard_normal((classes, WIDTH))
    common = rng.choice([0.0, 1.0]) * rng.standard_normal((size, WIDTH))
    inputs = {}
    for m in range(modalities):
        shown = parts[m] if together and m < 2 else label
        strength = rng.uniform(0.2, 1.0) * (rng.random() < 0.8)
        strength = 1.5 if together and m < 2 else strength
        own = rng.uniform(0.3, 1.0) * rng.standard_normal((size, WIDTH))
        width = int(rng.integers(WIDTH, 129))
        mixture = rng.standard_normal((WIDTH, width)) / np.sqrt(WIDTH)
        x = (strength * centres[shown] + common + own) @ mixture
        x = np.tanh(x) if rng.random() < 0.5 else x
        noise = rng.uniform(0.1, 1.0) * rng.standard_normal(x.shape)
        inputs[f"m{m}"] = (x + noise).astype(np.float32)
    hidden = 128 if together or rng.random() < 0.5 else 0
    return Drawn(inputs, label, classes, hidden)
