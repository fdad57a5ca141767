"""One run: train one method on one task under one condition, and measure it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .conditions import CONDITIONS, TEST_CONDITIONS, corrupt_test, prepare
from .config import Config
from .data import MARKS, SPOKEN, Split, family
from .measures import auroc, calibration_error, doubt, probe
from .methods import METHODS, Method, Problem, Rehearsal, expected
from .models import Fusion, Heads, Network

BATCH = 64
# Training samples of an epoch. A condition with fewer takes as many steps nevertheless.
EPOCH = {
    "uci": 1000,
    "odd": 1000,
    "digits": 1000,
    "starving": 1000,
    "dominated": 1000,
    "overlap": 4000,
    "rare": 1000,
    "question": 1000,
    "reference": 1000,
    "common": 1000,
    "drawn": 1000,
    "together": 1000,
    "diabetes": 300,
}

Measures = dict[str, float | str]


def run(config: Config, spoken: Path = SPOKEN) -> Measures:
    """Train and measure, on one thread; see README.md for the measures."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    split = prepare(config.data, config.condition, config.seed, spoken)
    per_epoch = math.ceil(EPOCH[family(config.data)] / BATCH)
    epochs = config.epochs * CONDITIONS[config.condition].epochs
    problem = _problem(split, config.seed, epochs, per_epoch)
    method = METHODS[config.method].build(problem, config.setting)

    training, curve, label_noise = 0.0, [], []
    marks = epochs * MARKS[family(config.data)]
    for seconds in _fit(method, split, problem, config.seed, marks):
        training += seconds
        curve.append(split.score(_predict(method.network, split.test).fused.softmax(dim=1)))
        if method.state is not None:
            label_noise.append(method.state.summary().get("label_noise", math.nan))
    method.finish()

    measures: Measures = {
        "score": split.score(_predict(method.network, split.test).fused.softmax(dim=1)),
        "curve": _compact(curve),
        "label_noise": _compact(label_noise, digits=3),
        "ms_per_step": 1000.0 * training / problem.steps,
        **_probes(method.network, split),
    }
    if split.centres is None:
        logits = _predict(method.network, split.test).fused
        measures["ece"] = calibration_error(logits.softmax(dim=1), split.test_truth)
        if method.state is not None:
            scaled = logits / method.state.temperature
            measures["ece_scaled"] = calibration_error(scaled.softmax(dim=1), split.test_truth)
    if config.condition == "clean":
        for name in TEST_CONDITIONS:
            heads = _predict(method.network, *corrupt_test(name, split.test, config.seed))
            measures[name] = split.score(heads.fused.softmax(dim=1))
    if method.state is not None and not split.target.is_floating_point():
        wrong = (split.target != split.truth).numpy()
        if wrong.any():
            order, scores = method.state.suspects()
            suspicion = torch.empty_like(scores).index_copy_(0, order, scores)
            measures["audit"] = auroc(suspicion.double().numpy(), wrong)
            if "/" not in config.method:  # for ablations, the other's would be the same again
                other, source = doubt(list(split.train.values()), split.target)
                measures["audit_other"] = auroc(other, wrong)
                measures["audit_other_by"] = source
    measures["seconds"] = time.perf_counter() - started
    return measures


def _problem(split: Split, seed: int, epochs: int, per_epoch: int) -> Problem:
    shapes = {name: x.shape[1:] for name, x in split.train.items()}

    def network(fusion: Fusion) -> Network:
        torch.manual_seed(seed)
        return Network(shapes, split.num_classes, fusion, split.hidden)

    return Problem(
        split.modalities,
        len(split.target),
        epochs,
        epochs * per_epoch,
        network,
        partial(_rehearse, split, seed, per_epoch),
    )


def _fit(method: Method, split: Split, problem: Problem, seed: int, marks: int) -> Iterator[float]:
    """Train; at every mark, the seconds that the steps since the last one took."""
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3, fused=True)
    stream = _batches(len(split.target), seed)
    for mark in range(marks):
        method.network.train()
        started = time.perf_counter()
        begin, end = (problem.steps * k // marks for k in (mark, mark + 1))
        for index in islice(stream, end - begin):
            inputs = {name: x[index] for name, x in split.train.items()}
            optimizer.zero_grad()
            method.backward(inputs, split.target[index], index)
            optimizer.step()
        yield time.perf_counter() - started


def _batches(size: int, seed: int) -> Iterator[Tensor]:
    """Indices, pass after pass in a new order; the same for each method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(size, generator=generator), BATCH)


def _rehearse(
    split: Split, seed: int, per_epoch: int, make: Callable[[Problem], Method], epochs: int
) -> Rehearsal:
    """Train on 80% of the training set; see ``Rehearsal``."""
    order = torch.randperm(len(split.target), generator=torch.Generator().manual_seed(seed))
    border = round(0.8 * len(order))
    train, rest = split.take(order[:border]), split.take(order[border:])
    problem = _problem(train, seed, epochs, per_epoch)
    method = make(problem)

    def losses(part: Split) -> Tensor:
        heads = _predict(method.network, part.train)
        return torch.stack([F.cross_entropy(x, part.target) for x in heads.all()])

    before = losses(train), losses(rest)
    for _ in _fit(method, train, problem, seed, marks=1):
        pass
    method.finish()
    after = losses(train), losses(rest)
    predicted = [x.argmax(dim=1) for x in _predict(method.network, rest.train).all()]
    hits = [
        expected(F.one_hot(x, split.num_classes).float(), rest.target).mean() for x in predicted
    ]
    return Rehearsal((before[0], after[0]), (before[1], after[1]), torch.stack(hits))


@torch.no_grad()
def _predict(network: Network, inputs: dict[str, Tensor], present: Tensor | None = None) -> Heads:
    network.eval()
    heads: Heads = network(inputs, present)
    return heads


def _probes(network: Network, split: Split) -> Measures:
    """Score of a linear probe on each frozen encoder, fitted to the true labels."""
    train = _predict(network, split.train).features
    test = _predict(network, split.test).features
    scores = {
        name: split.score(probe(train[name], split.truth, test[name], split.num_classes))
        for name in split.modalities
    }
    return {
        "worst_probe": min(scores.values()),
        "probes": " ".join(f"{name}={score:.2f}" for name, score in scores.items()),
    }


def _compact(values: list[float], digits: int = 1) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
