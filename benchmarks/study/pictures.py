"""The pictures of the report."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .bars import NOISY, OURS, compared, lead
from .results import Cell, Runs, curve

TESTED = ("noise-2", "swap-100", "absent-100")  # of the severities, for want of room
COLUMNS = 4
LINES = ("single", "late", "joint", "uniform", "ogm_ge", "mmpareto", OURS)


def draw_leads(cells: list[Cell], path: Path) -> bool:
    """Difference of DynCIM to the best other method of each cell, with its interval."""
    shown = [cell for cell in compared(cells) if not cell.tested or cell.condition in TESTED]
    found = [(cell, *pair) for cell in shown if (pair := lead(cell))]
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(7, 1 + 0.17 * len(found)), layout="constrained")
    for y, (_, _, gap) in enumerate(reversed(found)):
        colour = "tab:green" if gap.low > 0 else "tab:red" if gap.high < 0 else "tab:gray"
        half = gap.half if np.isfinite(gap.half) else 0.0
        axes.errorbar(gap.mean, y, xerr=half, fmt="o", markersize=3, color=colour)
    titles = [f"{cell.data}, {cell.title} (best other: {other})" for cell, other, _ in found]
    axes.set_yticks(range(len(found)), titles[::-1], fontsize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    figure.supxlabel("DynCIM minus the best other method, points (paired by seed, 95%)", fontsize=8)
    return _save(figure, path)


def draw_curves(runs: Runs, title: str, path: Path) -> bool:
    """Mean score over the epochs."""
    methods = [name for name in LINES if name in runs]
    if not methods:
        return False
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in methods:
        mean = np.mean([curve(row, "curve") for row in runs[name].values()], axis=0)
        width = 2.5 if name == OURS else 1.2
        epochs = max(int(row["epochs"]) for row in runs[name].values())
        axes.plot(np.linspace(0, epochs, 1 + len(mean))[1:], mean, label=name, linewidth=width)
    axes.set(title=title, xlabel="epoch", ylabel="test accuracy, %")
    axes.legend(fontsize=8)
    return _save(figure, path)


def draw_label_noise(found: dict[tuple[str, str], Runs], path: Path) -> bool:
    """The label noise that DynCIM sees over the epochs: what its strength follows."""
    chosen = {
        key: runs[OURS]
        for key, runs in found.items()
        if OURS in runs
        and key[1] in ("clean", *NOISY)
        and all(row["label_noise"] for row in runs[OURS].values())
    }
    if not chosen:
        return False
    titles = list(dict.fromkeys(data for data, _ in chosen))
    rows = -(-len(titles) // COLUMNS)
    figure, grid = plt.subplots(
        *(rows, min(COLUMNS, len(titles))),
        figsize=(9, 0.5 + 2.1 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(titles) :]:
        axes.set_axis_off()
    for axes, title in zip(grid.flat, titles, strict=False):
        for (data, condition), runs in chosen.items():
            if data == title:
                mean = np.mean([curve(row, "label_noise") for row in runs.values()], axis=0)
                axes.plot(np.linspace(0, 1, len(mean)), mean, label=condition)
        axes.set_title(title, fontsize=7)
        axes.legend(fontsize=6)
    figure.supxlabel("share of training", fontsize=8)
    figure.supylabel("label noise seen", fontsize=8)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> bool:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
