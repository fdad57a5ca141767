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

LARGEST = 10.0  # difference that colours tell apart
COLUMNS = 4
LINES = ("single", "late", "joint", "uniform", "ogm_ge", "mmpareto", OURS)


def draw_leads(cells: list[Cell], path: Path) -> bool:
    """Difference of DynCIM to the best other method of each cell, bold where 0 is outside of it."""
    found = {(c.data, c.title): pair[1] for c in compared(cells) if (pair := lead(c))}
    if not found:
        return False
    tasks, titles = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    figure, axes = plt.subplots(
        figsize=(1.5 + 0.62 * len(titles), 1.3 + 0.27 * len(tasks)), layout="constrained"
    )
    grid = np.full((len(tasks), len(titles)), np.nan)
    for (task, title), gap in found.items():
        y, x = tasks.index(task), titles.index(title)
        grid[y, x] = gap.mean
        weight = "bold" if gap.low > 0 or gap.high < 0 else "normal"
        axes.text(x, y, f"{gap.mean:+.1f}", ha="center", va="center", fontsize=7, weight=weight)
    axes.imshow(grid, cmap="RdYlGn", vmin=-LARGEST, vmax=LARGEST, aspect="auto")
    axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
    names = [title.replace(" at test", "\nat test") for title in titles]
    axes.set_xticks(range(len(titles)), names, fontsize=7, rotation=45, ha="right")
    axes.set_title("DynCIM minus the best other method, points; bold: 0 is outside 95%", fontsize=8)
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
