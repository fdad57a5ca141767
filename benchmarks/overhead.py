"""What a step costs, next to what it replaces: ``python -m benchmarks.overhead --help``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dyncim_core import backends

from . import cases
from .measure import Timing, compare, extra_memory, launches

BATCHES, CLASSES, MODALITIES = (64, 256, 4096), (6, 31, 101, 1000, 50257), (1, 2, 3, 8)
LARGEST = 4e7  # logits of all heads in a cell
COMPILED = {(64, 101, 2), (256, 1000, 2)}
BASELINE = "cross-entropies"
Row = dict[str, Any]


class Bar(NamedTuple):
    """A ratio to reach, by every cell that it concerns."""

    name: str
    most: float
    table: str
    contestant: str
    concerns: Callable[[Row], bool]


CPU_BARS = (
    Bar("C kernel, C <= 101", 0.9, "loss", "native", lambda r: r["classes"] <= 101),
    Bar("C kernel, C >= 1000", 0.6, "loss", "native", lambda r: r["classes"] >= 1000),
    Bar("eager, C <= 101", 2.0, "loss", "eager", lambda r: r["classes"] <= 101),
    Bar("eager, 256 x 1000", 1.2, "loss", "eager", lambda r: _size(r) == (256, 1000)),
    Bar("eager, 4096 x 1000", 1.0, "loss", "eager", lambda r: _size(r) == (4096, 1000)),
    Bar("eager, 64 x 50257", 1.0, "loss", "eager", lambda r: _size(r) == (64, 50257)),
    Bar("GatedFusion", 1.3, "fusion", "GatedFusion", lambda r: True),
    Bar("training step", 1.01, "training", "DynCIM", lambda r: True),
)
CUDA_BARS = (
    Bar("Triton, C <= 101", 0.8, "loss", "triton", lambda r: r["classes"] <= 101),
    Bar("Triton, C >= 4096", 0.5, "loss", "triton", lambda r: r["classes"] >= 4096),
    Bar("GatedFusion", 1.3, "fusion", "GatedFusion", lambda r: True),
    Bar("training step", 1.01, "training", "DynCIM", lambda r: True),
)


def _size(row: Row) -> tuple[int, int]:
    return row["batch"], row["classes"]


def loss_table(device: str, grid: list[tuple[int, int, int]], seconds: float) -> Iterator[Row]:
    """Forward and backward of the loss with its state, against M + 1 cross-entropies."""
    fastest = "triton" if device == "cuda" else "native"
    for batch, classes, modalities in tqdm(grid, desc="loss", disable=None):
        logits, target = cases.heads(batch, classes, modalities, device)
        steps = {
            BASELINE: cases.cross_entropies(logits, target),
            "autograd": cases.autograd(logits, target),
            "eager": cases.loss(logits, target, "eager"),
        }
        if backends()[fastest] == "available":
            steps[fastest] = cases.loss(logits, target, fastest)
            steps[f"{fastest}, with memory"] = cases.loss(logits, target, fastest, samples=50_000)
        if (batch, classes, modalities) in COMPILED:
            torch.compiler.reset()
            steps["cross-entropies, compiled"] = cases.cross_entropies(logits, target, True)
            steps["compiled"] = cases.loss(logits, target, None, compiled=True)
        row: Row = {"batch": batch, "classes": classes, "modalities": modalities}
        yield row | _timings(compare(steps, device, seconds))


def fusion_table(device: str, seconds: float) -> Iterator[Row]:
    """Forward and backward of concatenation and a linear head, with and without gates."""
    grid = [(64, 6, 2, 64), (64, 101, 2, 512), (256, 101, 2, 512), (256, 1000, 3, 512)]
    for batch, classes, modalities, width in tqdm(grid, desc="fusion", disable=None):
        size = (batch, classes, modalities, width, device)
        steps = {
            "concatenation": cases.fusion(False, *size),
            "GatedFusion": cases.fusion(True, *size),
        }
        row: Row = {"batch": batch, "classes": classes, "modalities": modalities, "width": width}
        yield row | _timings(compare(steps, device, seconds))


def training_table(device: str, seconds: float) -> Iterator[Row]:
    """A whole training step with real encoders."""
    side = 224 if device == "cuda" else 64
    grid = (
        ("ResNet-18, two", cases.residual_encoder, [(3, side, side), (1, side, side)], 16, 101),
        ("digit CNN, two", cases.digit_encoder, [(1, 64, 32), (1, 16, 16)], 64, 10),
    )
    for name, encoder, shapes, batch, classes in tqdm(grid, desc="training", disable=None):
        steps = {
            key: cases.training_step(curriculum, encoder, shapes, batch, classes, device)
            for key, curriculum in (("cross-entropies", False), ("DynCIM", True))
        }
        yield {"encoders": name, "batch": batch, "classes": classes} | _timings(
            compare(steps, device, 4 * seconds)
        )


def resources_table(device: str) -> Iterator[Row]:
    """Peak memory beyond the gradients, as a share of the logits, and launches in a step."""
    fastest = "triton" if device == "cuda" else "native"
    for batch, classes, modalities in ((64, 101, 2), (256, 1000, 2), (64, 50257, 2)):
        logits, target = cases.heads(batch, classes, modalities, device)
        size = sum(x.numel() * x.element_size() for x in logits)
        steps = {
            BASELINE: cases.cross_entropies(logits, target),
            "autograd": cases.autograd(logits, target),
            "eager": cases.loss(logits, target, "eager"),
        }
        if backends()[fastest] == "available":
            steps[fastest] = cases.loss(logits, target, fastest)
        for name, step in steps.items():
            share = extra_memory(step, device) / size
            if name == "native":  # two rows of scratch, which torch does not see
                share += 2 * 4 * classes / size
            yield {
                "batch": batch,
                "classes": classes,
                "modalities": modalities,
                "contestant": name,
                "memory": share,
                "launches": launches(step, device),
            }


def slopes(rows: list[Row]) -> Iterator[Row]:
    """Growth of the time of a step in each size: the slope in logarithms, others fixed."""
    sizes = ("batch", "classes", "modalities")
    for contestant in (BASELINE, "eager", "native", "triton"):
        found = [row for row in rows if contestant in row]
        if not found:
            continue
        result: Row = {"contestant": contestant}
        logs = np.log([[row[s] + (s == "modalities") for s in sizes] for row in found])
        times = np.log([row[contestant]["us"] for row in found])
        big = np.array([np.prod([row[s] for s in sizes]) > 1e5 for row in found])
        design = np.column_stack([logs[big], np.ones(big.sum())])
        if len(design) > 4:
            fitted = np.linalg.lstsq(design, times[big], rcond=None)[0]
            yield result | {s: float(x) for s, x in zip(sizes, fitted, strict=False)}


def verdicts(tables: dict[str, list[Row]], device: str) -> Iterator[Row]:
    """Each bar, the worst ratio among the cells that it concerns, and how many reach it."""
    for bar in CUDA_BARS if device == "cuda" else CPU_BARS:
        ratios = [
            row[bar.contestant]["ratio"]
            for row in tables[bar.table]
            if bar.contestant in row and bar.concerns(row)
        ]
        if ratios:
            yield {
                "bar": bar.name,
                "most": bar.most,
                "best": min(ratios),
                "median": float(np.median(ratios)),
                "worst": max(ratios),
                "met": f"{sum(r <= bar.most for r in ratios)} of {len(ratios)}",
            }


def _timings(found: dict[str, Timing]) -> Row:
    return {name: asdict(timing) for name, timing in found.items()}


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
    if isinstance(value, dict):
        return f"{value['us']:,.0f} us" if value["ratio"] == 1.0 else f"{value['ratio']:.2f}"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return "" if value is None else str(value)


def draw(rows: list[Row], path: Path) -> None:
    """Ratio to the cross-entropies over the number of classes, for two modalities."""
    from matplotlib import pyplot as plt  # the extra "examples"

    figure, grid = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    for axes, batch in zip(grid, BATCHES, strict=True):
        for name in ("autograd", "eager", "native", "triton"):
            points = [
                (row["classes"], row[name]["ratio"])
                for row in rows
                if row["batch"] == batch and row["modalities"] == 2 and name in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=f"{batch} samples", xscale="log", yscale="log", xlabel="classes")
    grid[0].set_ylabel("time / cross-entropies")
    grid[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each cell")
    parser.add_argument("--quick", action="store_true", help="a few cells, half a minute")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, seconds = options.device, options.seconds
    grid = [
        (b, c, m)
        for m in MODALITIES
        for b in BATCHES
        for c in CLASSES
        if b * c * (1 + m) <= LARGEST and (m == 2 or b * c <= 300_000)
    ]
    if options.quick:
        grid, seconds = [(64, 6, 2), (256, 1000, 2)], 0.5
        COMPILED.clear()

    tables = {
        "loss": list(loss_table(device, grid, seconds)),
        "fusion": list(fusion_table(device, seconds)),
        "training": list(training_table(device, seconds)),
        "resources": list(resources_table(device)),
    }
    tables["growth"] = list(slopes(tables["loss"]))
    tables["bars"] = list(verdicts(tables, device))
    for name, rows in tables.items():
        print(f"\n## {name}\n\n{markdown(rows)}")
    others = [name for name in ("liger_kernel", "cut_cross_entropy") if find_spec(name)]
    if not others or device == "cpu":
        print("\nNo comparison with other fused kernels: they need CUDA and to be installed.")

    options.out.mkdir(parents=True, exist_ok=True)
    found = environment(device, options.threads)
    path = options.out / f"{device}.json"
    path.write_text(json.dumps({"environment": found, **tables}, indent=1) + "\n")
    draw(tables["loss"], options.out / f"overhead-{device}.png")
    print(f"\n{found['device']}, torch {found['torch']}, commit {found['commit']}: {path}")


if __name__ == "__main__":
    main()
