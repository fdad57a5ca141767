"""Train on real handwritten digits: joint training, uniform unimodal losses, DynCIM.

Six feature views of the same 2,000 digits stand for modalities. Every method trains the
same encoders on the same split, batches and labels, for a few seeds, on clean labels
and on labels partly replaced at random; the models trained on clean labels are also
tested with one random modality of every sample corrupted. Prints a table, lists the
training samples that look mislabelled, and writes two pictures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion

DATA = Path(__file__).parent / "data" / "uci_multiple_features.npz"
VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")
METHODS = {
    "joint": "joint training on concatenated features",
    "uniform": "joint training plus one equal loss for every modality",
    "dyncim": "DynCIMLoss and GatedFusion",
}
CORRUPTIONS = ("noise", "swap", "absent")
NUM_CLASSES = 10
WIDTH = 64


class Split(NamedTuple):
    """One seed's data: standardised views, labels to train on, and the true ones."""

    train: dict[str, Tensor]
    labels: Tensor
    truth: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor


class Task(NamedTuple):
    """One training run."""

    views: tuple[str, ...]
    method: str
    noise: float
    seed: int
    epochs: int
    train_size: int


@dataclass
class Result:
    """What a run measured: accuracies in percent, and for DynCIM its curriculum."""

    task: Task
    accuracy: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    suspects: NDArray[np.int64] | None = None
    mislabelled: NDArray[np.bool_] | None = None


class Network(nn.Module):
    """An encoder and a head for each view, and a head over the fused features."""

    def __init__(self, widths: dict[str, int], state: CurriculumState | None) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU()
                )
                for name, width in widths.items()
            }
        )
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, NUM_CLASSES) for name in widths})
        self.head = nn.Linear(WIDTH * len(widths), NUM_CLASSES)
        self.fusion = None
        if state is not None:
            self.fusion = GatedFusion(dict.fromkeys(widths, WIDTH), state=state)

    def forward(
        self, inputs: dict[str, Tensor], present: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Fused logits, each view's own logits, and the gates if there are any."""
        features = {name: encode(inputs[name]) for name, encode in self.encoders.items()}
        unimodal = {name: head(features[name]) for name, head in self.heads.items()}
        if self.fusion is not None:
            fused, gates, gated = self.fusion(features, unimodal=unimodal, present=present)
            return self.head(fused) + gated, unimodal, gates
        streams = list(features.values())
        if present is not None:
            streams = [x * present[:, m : m + 1] for m, x in enumerate(streams)]
        return self.head(torch.cat(streams, dim=1)), unimodal, None


def load_split(task: Task) -> Split:
    """Split, standardise and (partly) mislabel the data, the same for every method."""
    with np.load(DATA) as archive:
        label = archive["label"].astype(np.int64)
        views = {name: archive[name].astype(np.float32) for name in task.views}
    rng = np.random.default_rng(task.seed)
    order = rng.permutation(len(label))
    train, test = order[: task.train_size], order[-1000:]
    train_views, test_views = {}, {}
    for name, view in views.items():
        mean, std = view[train].mean(axis=0), view[train].std(axis=0) + 1e-6
        train_views[name] = torch.from_numpy((view[train] - mean) / std)
        test_views[name] = torch.from_numpy((view[test] - mean) / std)
    labels = label[train].copy()
    replaced = rng.random(len(train)) < task.noise
    labels[replaced] = rng.integers(0, NUM_CLASSES, replaced.sum())
    return Split(
        train_views,
        torch.from_numpy(labels),
        torch.from_numpy(label[train]),
        test_views,
        torch.from_numpy(label[test]),
    )


def batches(size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the batches of one epoch."""
    yield from torch.randperm(size, generator=generator).split(64)


def run(task: Task) -> Result:
    """Train one method on one seed, and test it."""
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    split = load_split(task)
    size = len(split.labels)
    curriculum = task.method == "dyncim"

    # The three lines that an existing trainer needs: the state, the loss, and (in
    # Network) the fusion.
    state = CurriculumState(task.views, num_samples=size)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state)
    plain = nn.CrossEntropyLoss()

    widths = {name: view.shape[1] for name, view in split.train.items()}
    network = Network(widths, state if curriculum else None)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(task.seed)
    history: list[dict[str, float]] = []
    for _ in range(task.epochs):
        network.train()
        for index in batches(size, generator):
            inputs = {name: view[index] for name, view in split.train.items()}
            target = split.labels[index]
            logits, unimodal, _ = network(inputs)
            if curriculum:
                loss = criterion(logits, target, unimodal=unimodal, index=index)
            else:
                loss = plain(logits, target)
                if task.method == "uniform":
                    loss = loss + sum(plain(head, target) for head in unimodal.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if curriculum:
            history.append(snapshot(network, state, split))
    result = Result(task, evaluate(network, split, task), history)
    if curriculum:
        result.suspects = state.suspects().indices.numpy()
        result.mislabelled = (split.labels != split.truth).numpy()
    return result


@torch.no_grad()
def snapshot(network: Network, state: CurriculumState, split: Split) -> dict[str, float]:
    """The curriculum after an epoch, for the picture."""
    network.eval()
    values = state.summary()
    gates = network(split.test)[2]
    for name, gate in zip(split.test, gates.mean(dim=0).tolist(), strict=True):
        values[f"gate/{name}"] = gate
    wrong = split.labels != split.truth
    values["weight/right"] = float(state.memory_weight[~wrong].mean())
    if wrong.any():
        values["weight/wrong"] = float(state.memory_weight[wrong].mean())
    return values


@torch.no_grad()
def evaluate(network: Network, split: Split, task: Task) -> dict[str, float]:
    """Test accuracy in percent, clean and with one random view of every sample corrupted."""
    network.eval()
    size = len(split.test_labels)
    generator = torch.Generator().manual_seed(task.seed)
    hit = torch.randint(len(task.views), (size,), generator=generator)
    other = torch.randperm(size, generator=generator)

    def accuracy(inputs: dict[str, Tensor], present: Tensor | None = None) -> float:
        logits = network(inputs, present)[0]
        return 100.0 * float((logits.argmax(dim=1) == split.test_labels).float().mean())

    def corrupted(by: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where((hit == m).unsqueeze(1), by[name], view)
            for m, (name, view) in enumerate(split.test.items())
        }

    noisy = {
        name: view + 2.0 * torch.randn(view.shape, generator=generator)
        for name, view in split.test.items()
    }
    present = torch.arange(len(task.views)) != hit.unsqueeze(1)
    return {
        "clean": accuracy(split.test),
        "noise": accuracy(corrupted(noisy)),
        "swap": accuracy(corrupted({name: view[other] for name, view in split.test.items()})),
        "absent": accuracy(split.test, present),
    }
