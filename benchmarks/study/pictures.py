"""The pictures of the report."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .bars import OURS, lead
from .results import Cell, Runs, curve

LINES = ("single", "late", "joint", "uniform", "ogm_ge", "mmpareto", OURS)


def draw_leads(cells: list[Cell], path: Path) -> bool:
    """Difference of DynCIM to the best other method of every cell, with its interval."""
    found = [(cell, *pair) for cell in cells if (pair := lead(cell))]
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
    axes.set_xlabel("DynCIM minus the best other method, points (paired, 95%)")
    return _save(figure, path)


def draw_curves(runs: Runs, title: str, path: Path) -> bool:
    """Mean score after every epoch."""
    methods = [name for name in LINES if name in runs]
    if not methods:
        return False
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in methods:
        mean = np.mean([curve(row, "curve") for row in runs[name].values()], axis=0)
        width = 2.5 if name == OURS else 1.2
        axes.plot(np.arange(1, 1 + len(mean)), mean, label=name, linewidth=width)
    axes.set(title=title, xlabel="epoch", ylabel="test accuracy, %")
    axes.legend(fontsize=8)
    return _save(figure, path)


def draw_label_noise(found: dict[tuple[str, str], Runs], path: Path) -> bool:
    """The label noise that DynCIM sees over the epochs: what its strength follows."""
    chosen = {
        key: runs[OURS]
        for key, runs in found.items()
        if OURS in runs and all(row["label_noise"] for row in runs[OURS].values())
    }
    if not chosen:
        return False
    titles = list(dict.fromkeys(data for data, _ in chosen))
    figure, grid = plt.subplots(
        1, len(titles), figsize=(2.6 * len(titles), 3), sharey=True, layout="constrained"
    )
    for axes, title in zip(np.atleast_1d(grid), titles, strict=True):
        for (data, condition), runs in chosen.items():
            if data == title:
                mean = np.mean([curve(row, "label_noise") for row in runs.values()], axis=0)
                axes.plot(np.linspace(0, 1, len(mean)), mean, label=condition)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("share of training")
        axes.legend(fontsize=6)
    np.atleast_1d(grid)[0].set_ylabel("label noise seen")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> bool:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
