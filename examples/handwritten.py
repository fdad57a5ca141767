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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from handwritten_figures import Row, draw_accuracies, draw_curriculum
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion

DATA = Path(__file__).parent / "data" / "uci_multiple_features.npz"
VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")
# Joint training on concatenated features; the same plus one equal loss for every view;
# DynCIMLoss with GatedFusion.
METHODS = ("joint", "uniform", "dyncim")
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
    history: list[dict[str, float]]
    suspects: NDArray[np.int64]  # training samples, the most suspect first
    mislabelled: NDArray[np.bool_]  # whether each of them really was


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
    order = torch.randperm(size, generator=generator)
    yield from torch.split(order, 64)


def run(task: Task) -> Result:
    """Train one method on one seed, and test it."""
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    split = load_split(task)
    size = len(split.labels)
    curriculum = task.method == "dyncim"

    # What an existing trainer adds: the state, the loss, and the fusion (in Network).
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
    suspects = state.suspects().indices if curriculum else torch.arange(0)
    wrong = (split.labels != split.truth)[suspects]
    return Result(task, evaluate(network, split, task), history, suspects.numpy(), wrong.numpy())


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


def audit_auroc(result: Result) -> float:
    """Chance that a mislabelled training sample ranks above a correctly labelled one."""
    wrong = result.mislabelled
    right_below = np.cumsum(~wrong[::-1])[::-1]
    return float(right_below[wrong].mean() / (~wrong).sum())


def run_all(tasks: Sequence[Task], jobs: int) -> list[Result]:
    """Every run, ``jobs`` at a time, under a progress bar, in the order of ``tasks``."""
    progress = partial(tqdm, total=len(tasks), unit="run", disable=None)
    if jobs == 1:
        return list(progress(map(run, tasks)))
    context = multiprocessing.get_context("spawn")  # torch and fork do not mix
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(run, task) for task in tasks]
        for _ in progress(as_completed(futures)):
            pass
        return [future.result() for future in futures]


def rows(results: Sequence[Result], noise: float) -> Iterator[Row]:
    """Rows of the table: per view set, training labels and test condition."""
    for views in dict.fromkeys(result.task.views for result in results):
        conditions = [("clean", 0.0, "clean")]
        conditions += [(f"{noise:.0%} label noise", noise, "clean")] if noise else []
        conditions += [(f"{name} at test time", 0.0, name) for name in CORRUPTIONS]
        for title, level, key in conditions:
            accuracy = {
                method: np.array(
                    [
                        result.accuracy[key]
                        for result in results
                        if result.task[:3] == (views, method, level)
                    ]
                )
                for method in METHODS
            }
            yield Row("+".join(views), title, accuracy)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error, in points (no error from one seed)."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def print_table(table: Sequence[Row]) -> None:
    """Accuracies as a Markdown table, with the paired difference to the honest baseline."""
    print("| views | condition | " + " | ".join(METHODS) + " | dyncim - uniform |")
    print("|---|---|" + "---|" * (len(METHODS) + 1))
    for views, condition, accuracy in table:
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(x)) for x in accuracy.values()]
        gain = mean_and_error(accuracy["dyncim"] - accuracy["uniform"])
        print(f"| {views} | {condition} | {' | '.join(cells)} | {gain[0]:+.1f} ± {gain[1]:.1f} |")


def print_suspects(results: Sequence[Result], top: int) -> None:
    """How many of the samples that DynCIM suspects most were mislabelled."""
    noisy = [r for r in results if r.task.method == "dyncim" and r.task.noise]
    for views in dict.fromkeys(result.task.views for result in noisy):
        runs = [result for result in noisy if result.task.views == views]
        first = runs[0]
        wrong = first.mislabelled
        print(
            f"{'+'.join(views)}, seed {first.task.seed}: {wrong[:top].sum()} of the "
            f"{len(wrong[:top])} most suspect samples were mislabelled "
            f"({wrong.mean():.0%} of all were), such as {first.suspects[:8].tolist()}; "
            f"AUROC over {len(runs)} seeds {np.mean([audit_auroc(r) for r in runs]):.3f}"
        )


def view_set(text: str) -> tuple[str, ...]:
    """Parse ``kar+fou``."""
    names = tuple(text.split("+"))
    unknown = [name for name in names if name not in VIEWS]
    if unknown or len(set(names)) < len(names) or len(names) < 2:
        raise argparse.ArgumentTypeError(
            f"expected two or more different views of {', '.join(VIEWS)} joined by +, got {text!r}"
        )
    return names


def number_in(low: float, high: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number of the kind in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected {kind.__name__} in [{low:g}, {high:g}], got {text!r}"
            )
        return value

    return parse


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is trained."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole = partial(number_in, kind=int)
    parser.add_argument(
        "--views",
        nargs="+",
        type=view_set,
        metavar="A+B",
        default=[("kar", "fou"), ("fou", "zer", "mor"), ("pix", "zer", "mor")],
        help=f"view sets, of {', '.join(VIEWS)}",
    )
    parser.add_argument(
        "--noise", type=number_in(0.0, 1.0, float), default=0.3, help="share of labels replaced"
    )
    parser.add_argument("--seeds", type=whole(1, 1000), default=5, help="number of seeds")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="first seed")
    parser.add_argument("--epochs", type=whole(1, 10_000), default=40, help="epochs of each run")
    parser.add_argument(
        "--train-size", type=whole(64, 1000), default=1000, help="training samples; 1,000 test"
    )
    parser.add_argument("--suspects", type=whole(1, 1000), default=100, help="how many to check")
    parser.add_argument(
        "--jobs", type=whole(1, 256), default=min(2, os.cpu_count() or 1), help="runs at a time"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write to {options.out}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every method on every seed and condition; print and draw the results."""
    options = parse_arguments(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    tasks = [
        Task(views, method, noise, seed, options.epochs, options.train_size)
        for views in options.views
        for noise in dict.fromkeys((0.0, options.noise))
        for method in METHODS
        for seed in seeds
    ]
    results = run_all(tasks, options.jobs)
    table = list(rows(results, options.noise))
    print(f"Test accuracy in percent, mean ± standard error over {options.seeds} seeds.")
    print_table(table)
    print_suspects(results, options.suspects)

    lives = [r for r in results if r.task.method == "dyncim" and r.task.noise == options.noise]
    life = next((r for r in lives if len(r.task.views) > 2), lives[0])
    draw_accuracies(table, options.out / "accuracies.png")
    title = f"{'+'.join(life.task.views)}, {life.task.noise:.0%} of labels replaced"
    draw_curriculum(life.history, life.task.views, title, options.out / "curriculum.png")
    print(f"Pictures: {options.out / 'accuracies.png'}, {options.out / 'curriculum.png'}")


if __name__ == "__main__":
    main()
