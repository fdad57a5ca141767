"""What a step costs, next to what it replaces: ``python -m benchmarks.overhead --help``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dyncim_core import CurriculumState, backends

from . import cases
from .measure import compare, extra_memory, launches, native_scratch

BATCHES, CLASSES, MODALITIES = (64, 256, 4096), (6, 31, 101, 1000, 50257), (1, 2, 3, 8)
LARGEST = 4e7  # logits of all heads in a cell
BASELINE = "cross-entropies"
PEERS = ("liger_kernel", "cut_cross_entropy")
Row = dict[str, Any]
Tables = dict[str, list[Row]]
Steps = dict[str, cases.Step]


class Cell(NamedTuple):
    """Sizes of a problem; of its features where it has any, its encoders where it trains them."""

    batch: int
    classes: int
    modalities: int = 2
    width: int | None = None
    encoders: str | None = None


class Plan(NamedTuple):
    """What to measure, and for how many seconds a cell."""

    seconds: float
    loss: Sequence[Cell]
    compiled: Sequence[Cell]
    dispatch: Sequence[Cell]
    fusion: Sequence[Cell]
    training: Sequence[Cell]
    resources: Sequence[Cell]


RESNETS, DIGITS = Cell(16, 101, encoders="ResNet-18"), Cell(64, 10, encoders="digit CNN")
FULL = Plan(
    seconds=3.0,
    loss=[
        Cell(b, c, m)
        for m in MODALITIES
        for b in BATCHES
        for c in CLASSES
        if b * c * (1 + m) <= LARGEST
    ],
    compiled=[Cell(64, 101), Cell(256, 1000)],
    dispatch=[Cell(64, 6)],
    fusion=[
        Cell(64, 6, 2, 64),
        Cell(64, 101, 2, 512),
        Cell(256, 101, 2, 512),
        Cell(256, 1000, 3, 512),
    ],
    training=[RESNETS, DIGITS],
    resources=[Cell(64, 101), Cell(256, 1000), Cell(64, 50257)],
)
QUICK = Plan(
    seconds=0.5,
    loss=[Cell(64, 6), Cell(256, 1000)],
    compiled=[],
    dispatch=[Cell(64, 6)],
    fusion=[Cell(64, 6, 2, 64), Cell(256, 101, 2, 512)],
    training=[RESNETS, DIGITS],
    resources=[Cell(64, 101), Cell(256, 1000)],
)


class Bar(NamedTuple):
    """The most that a figure of a contestant may be, in every cell that the bar concerns."""

    device: str
    name: str
    most: float
    table: str
    contestant: str
    concerns: Callable[[Row], bool] = lambda row: True
    figure: str = "ratio"


BARS = (
    Bar("cpu", "C kernel, C <= 101", 0.9, "loss", "native", lambda r: r["classes"] <= 101),
    Bar("cpu", "C kernel, C >= 1000", 0.6, "loss", "native", lambda r: r["classes"] >= 1000),
    Bar("cpu", "eager, C <= 101", 2.0, "loss", "eager", lambda r: r["classes"] <= 101),
    Bar("cpu", "eager, 256 x 1000", 1.2, "loss", "eager", lambda r: _size(r) == (256, 1000)),
    Bar("cpu", "eager, 4096 x 1000", 1.0, "loss", "eager", lambda r: _size(r) == (4096, 1000)),
    Bar("cpu", "eager, 64 x 50257", 1.0, "loss", "eager", lambda r: _size(r) == (64, 50257)),
    Bar("cpu", "C kernel, extra memory", 0.02, "resources", "native", figure="memory"),
    Bar("cpu", "eager, extra memory", 0.02, "resources", "eager", figure="memory"),
    Bar("cpu", "GatedFusion", 1.3, "fusion", "GatedFusion"),
    Bar("cpu", "training step", 1.01, "training", "DynCIM"),
    Bar("cuda", "Triton, C >= 4096", 0.5, "loss", "triton", lambda r: r["classes"] >= 4096),
    Bar("cuda", "captured, C <= 101", 0.8, "captured", "triton", lambda r: r["classes"] <= 101),
    Bar("cuda", "Triton over compiled cross-entropy", 1.15, "compiled", "triton"),
    Bar("cuda", "80% of the copy bandwidth", 1.5 / 0.8, "bandwidth", "triton"),
    Bar("cuda", "Triton, extra memory", 0.02, "resources", "triton", figure="memory"),
    Bar("cuda", "Triton, launches", 6, "resources", "triton", figure="launches"),
    Bar("cuda", "GatedFusion", 1.3, "fusion", "GatedFusion"),
    Bar("cuda", "training step", 1.01, "training", "DynCIM"),
)


def _size(row: Row) -> tuple[int, int]:
    return row["batch"], row["classes"]


def loss_steps(cell: Cell, device: str) -> Steps:
    """Forward and backward of the loss with its state, against M + 1 cross-entropies."""
    logits, target = cases.heads(cell.batch, cell.classes, cell.modalities, device)
    steps = {
        BASELINE: cases.cross_entropies(logits, target),
        "autograd": cases.autograd(logits, target),
        "eager": cases.loss(logits, target, "eager"),
    }
    name = fastest(device)
    if name != "eager":
        memory = CurriculumState(cell.modalities, num_samples=50_000)
        steps[name] = cases.loss(logits, target, name)
        steps[f"{name}, with memory"] = cases.loss(logits, target, name, memory)
    return steps


def fastest(device: str) -> str:
    """The backend that a call on a device takes."""
    name = "triton" if device == "cuda" else "native"
    return name if backends()[name] == "available" else "eager"


def dispatch_steps(cell: Cell, device: str) -> Steps:
    """What a step costs that computes nothing, as an autograd function and as an operator."""
    logits, target = cases.heads(cell.batch, cell.classes, cell.modalities, device)
    return {
        BASELINE: cases.cross_entropies(logits, target),
        "autograd function": cases.dispatched(logits, registered=False),
        "registered operator": cases.dispatched(logits, registered=True),
    }


def compiled_steps(cell: Cell, device: str) -> Steps:
    """Compiled cross-entropies against the loss, compiled and not."""
    torch.compiler.reset()
    logits, target = cases.heads(cell.batch, cell.classes, cell.modalities, device)
    return {
        f"{BASELINE}, compiled": cases.cross_entropies(logits, target, compiled=True),
        BASELINE: cases.cross_entropies(logits, target),
        "DynCIMLoss, compiled": cases.loss(logits, target, None, compiled=True),
        fastest(device): cases.loss(logits, target, fastest(device)),
    }


def captured_steps(cell: Cell, device: str) -> Steps:
    """Both as CUDA graphs, which leave out what Python and the launches cost."""
    logits, target = cases.heads(cell.batch, cell.classes, cell.modalities, device)
    name = fastest(device)
    return {
        f"{BASELINE}, captured": cases.captured(cases.cross_entropies(logits, target)),
        name: cases.captured(cases.loss(logits, target, name)),
    }


def bandwidth_steps(cell: Cell, device: str) -> Steps:
    """A copy of the logits, two passes over memory, against the loss, which needs three."""
    logits, target = cases.heads(cell.batch, cell.classes, cell.modalities, device)
    name = fastest(device)
    return {"copy": cases.copies(logits), name: cases.loss(logits, target, name)}


def peer_steps(cell: Cell, device: str) -> Steps:
    """The loss after linear heads against public kernels that fuse cross-entropy with them."""
    size = (cell.batch, cell.classes, cell.modalities, 512, device)
    names = [BASELINE, "DynCIMLoss", *filter(find_spec, PEERS)]
    return {name: cases.from_features(name, *size) for name in names}


def fusion_steps(cell: Cell, device: str, trains: bool = True) -> Steps:
    """Concatenation and a linear head, with and without gates."""
    assert cell.width is not None
    size = (cell.batch, cell.classes, cell.modalities, cell.width, device, trains)
    return {
        "concatenation": cases.fusion(False, *size),
        "GatedFusion": cases.fusion(True, *size),
    }


def inference_steps(cell: Cell, device: str) -> Steps:
    """The same without gradients, where features are compared with those of training."""
    return fusion_steps(cell, device, trains=False)


def training_steps(cell: Cell, device: str) -> Steps:
    """A whole training step with two encoders."""
    encoder, shapes = cases.residual_encoder, [(3, 64, 64), (1, 64, 64)]
    if device == "cuda":
        shapes = [(3, 224, 224), (1, 224, 224)]
    if cell.encoders == DIGITS.encoders:
        encoder, shapes = cases.digit_encoder, [(1, 64, 32), (1, 16, 16)]
    size = (encoder, shapes, cell.batch, cell.classes, device)
    return {
        BASELINE: cases.training_step(False, *size),
        "DynCIM": cases.training_step(True, *size),
    }


def timed(
    name: str,
    cells: Sequence[Cell],
    build: Callable[[Cell, str], Steps],
    device: str,
    seconds: float,
) -> list[Row]:
    """A row for each cell, with the timing of each of its contestants."""
    rows = []
    for cell in tqdm(cells, desc=name, disable=None):
        found = compare(build(cell, device), device, seconds)
        rows.append(_sizes(cell) | {key: asdict(timing) for key, timing in found.items()})
    return rows


def _sizes(cell: Cell) -> Row:
    return {key: value for key, value in cell._asdict().items() if value is not None}


def resources(cell: Cell, device: str) -> Row:
    """Peak memory beyond the gradients as a share of the logits, and launches, of a step."""
    row = _sizes(cell)
    heads = 1 + cell.modalities
    size = 4 * cell.batch * cell.classes * heads
    for name, step in loss_steps(cell, device).items():
        share = extra_memory(step, device) / size
        row[name] = {"memory": share, "launches": launches(step, device)}
        if name.startswith("native"):
            holds_out = name.endswith("memory")
            scratch = native_scratch(cell.batch, cell.classes, heads, holds_out)
            row[name]["scratch"] = scratch / size
    return row


def measure(plan: Plan, device: str) -> Tables:
    """Measure what a plan names."""
    seconds, compiled = plan.seconds, plan.compiled
    if device == "cuda":  # where compiling is quick
        compiled = [cell for cell in plan.loss if cell.modalities == 2]
    tables = {
        "loss": timed("loss", plan.loss, loss_steps, device, seconds),
        "compiled": timed("compiled", compiled, compiled_steps, device, seconds),
        "dispatch": timed("dispatch", plan.dispatch, dispatch_steps, device, seconds),
        "fusion": timed("fusion", plan.fusion, fusion_steps, device, seconds),
        "inference": timed("inference", plan.fusion, inference_steps, device, seconds),
        "training": timed("training", plan.training, training_steps, device, 24 * seconds),
        "resources": [resources(cell, device) for cell in plan.resources],
    }
    if device == "cuda":
        small = [cell for cell in plan.loss if cell.classes <= 101]
        large = [cell for cell in plan.loss if cell.classes > 4096]
        tables["captured"] = timed("captured", small, captured_steps, device, seconds)
        tables["bandwidth"] = timed("bandwidth", large, bandwidth_steps, device, seconds)
        if any(map(find_spec, PEERS)):
            tables["peers"] = timed("peers", large, peer_steps, device, seconds)
    return tables


def derived(tables: Tables, device: str) -> Tables:
    """What follows from the figures measured."""
    return {"growth": list(growth(tables["loss"])), "bars": list(verdicts(tables, device))}


def growth(rows: list[Row]) -> Iterator[Row]:
    """How the time of a step grows with each size, others fixed: 1 is in proportion.

    Slopes in logarithms between the two largest sizes measured, where fixed costs count
    least; their median over the others' sizes, and the steepest of all.
    """
    axes = ("batch", "classes", "heads")
    for contestant in (BASELINE, "eager", "native", "triton"):
        times = {
            (row["batch"], row["classes"], 1 + row["modalities"]): row[contestant]["us"]
            for row in rows
            if contestant in row
        }
        found: dict[str, list[float]] = {}
        for k, axis in enumerate(axes):
            lines: dict[tuple[int, ...], list[tuple[int, float]]] = {}
            for sizes, us in times.items():
                lines.setdefault(sizes[:k] + sizes[k + 1 :], []).append((sizes[k], us))
            ends = [sorted(line)[-2:] for line in lines.values() if len(line) > 1]
            found[axis] = [log(b[1] / a[1]) / log(b[0] / a[0]) for a, b in ends]
        if all(found.values()):
            row: Row = {"contestant": contestant}
            row |= {axis: float(np.median(steps)) for axis, steps in found.items()}
            yield row | {"steepest": max(map(max, found.values()))}


def verdicts(tables: Tables, device: str) -> Iterator[Row]:
    """Each bar, the figures of the cells that it concerns, and how many reach it."""
    for bar in BARS:
        found = [
            row[bar.contestant][bar.figure]
            for row in tables.get(bar.table, [])
            if bar.device == device and bar.contestant in row and bar.concerns(row)
        ]
        row: Row = {"bar": f"{bar.device}: {bar.name}", "most": bar.most}
        if not found:
            yield row | {"met": "unmeasured"}
            continue
        reached = sum(x <= bar.most for x in found)
        row |= {"best": min(found), "median": float(np.median(found)), "worst": max(found)}
        yield row | {"met": f"{reached} of {len(found)}"}


def environment(device: str, threads: int) -> Row:
    """The machine, versions and commit that figures belong to."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    model = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "backends": backends(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown(rows: list[Row]) -> str:
    """A table of the rows; of a timing, the ratio, and the baseline's microseconds."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "us" in value:
        ratio = value["ratio"]
        if ratio == 1.0:
            return f"{value['us']:,.0f} us"
        return f"{ratio:.3f}" if abs(ratio - 1) < 0.05 else f"{ratio:.2f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(x)}" for key, x in value.items())
    if isinstance(value, float):
        return (
            f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
        )
    return "" if value is None else str(value)


def draw(rows: list[Row], device: str, path: Path) -> None:
    """Ratio to the cross-entropies over the number of classes, for two modalities; bars dashed."""
    from matplotlib import pyplot as plt  # the extra "examples"

    figure, grid = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    for axes, batch in zip(grid, BATCHES, strict=True):
        for k, name in enumerate(("autograd", "eager", "native", "triton")):
            seen = [r for r in rows if r["batch"] == batch and r["modalities"] == 2 and name in r]
            if seen:
                points = [(row["classes"], row[name]["ratio"]) for row in seen]
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{k}", label=name)
            for bar in BARS:
                if (bar.device, bar.table, bar.contestant) == (device, "loss", name):
                    at = [row["classes"] for row in seen if bar.concerns(row)]
                    if at:
                        ends = at[0] / 1.3, at[-1] * 1.3
                        axes.plot(ends, (bar.most, bar.most), color=f"C{k}", linestyle="--")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(title=f"{batch} samples", xscale="log", yscale="log", xlabel="classes")
    grid[0].set_ylabel("time / cross-entropies")
    grid[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--quick", action="store_true", help="a few cells, half a minute")
    parser.add_argument("--again", action="store_true", help="report what was measured before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    device, path = options.device, options.out / f"{options.device}.json"
    if options.again:
        tables = json.loads(path.read_text())
        found = tables.pop("environment")
    else:
        torch.set_num_threads(options.threads)
        tables = measure(QUICK if options.quick else FULL, device)
        found = environment(device, options.threads)
    tables |= derived(tables, device)

    for name, rows in tables.items():
        if rows:
            print(f"\n## {name}\n\n{markdown(rows)}")
    if "peers" not in tables:
        missing = "CUDA" if device == "cpu" else " and no ".join(PEERS)
        print(f"\nSkipped the comparison with other fused kernels: no {missing} here.")
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": found, **tables}, indent=1) + "\n")
    draw(tables["loss"], device, options.out / f"overhead-{device}.png")
    print(f"\n{found['device']}, torch {found['torch']}, commit {found['commit']}: {path}")


if __name__ == "__main__":
    main()
