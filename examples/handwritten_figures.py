"""The two pictures of ``handwritten.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

mpl.use("Agg")
COLOURS = {"joint": "#9aa5b1", "uniform": "#4c78a8", "dyncim": "#e4572e"}


class Row(NamedTuple):
    """One row of the table: accuracies in percent, one per seed, of each method."""

    views: str
    condition: str
    accuracy: dict[str, NDArray[np.float64]]


def draw_accuracies(table: Sequence[Row], path: Path) -> None:
    """Bars with standard errors, one panel per view set."""
    sets = list(dict.fromkeys(row.views for row in table))
    figure = Figure(figsize=(4.6 * len(sets), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for panel, views in zip(panels, sets, strict=True):
        rows = [row for row in table if row.views == views]
        width = 0.8 / len(rows[0].accuracy)
        for k, (method, colour) in enumerate(COLOURS.items()):
            values = [row.accuracy[method] for row in rows]
            errors = [x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0 for x in values]
            position = np.arange(len(rows)) + (k - 1) * width
            means = [x.mean() for x in values]
            panel.bar(position, means, width, yerr=errors, color=colour, label=method)
        names = [row.condition.replace(" at test time", "\n(test)") for row in rows]
        panel.set_xticks(range(len(rows)), [name.replace(" label", "\nlabel") for name in names])
        panel.tick_params(axis="x", labelsize=8)
        panel.set_title(views)
        panel.set_ylim(0, 100)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_curriculum(
    history: Sequence[dict[str, float]], views: Sequence[str], title: str, path: Path
) -> None:
    """The curriculum's life over the epochs of one run."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 3).ravel()
    signals = ("deviation", "consistency", "stability")
    groups = (
        (
            "modality level",
            {"GMR": "gmr", "HMIR": "hmir", "balance factor": "balance_factor"},
        ),
        ("quality", {name: f"quality/{name}" for name in ("fused", *views)}),
        ("gates, mean over test samples", {name: f"gate/{name}" for name in views}),
        ("sample-level signals", {name: f"signal/{name}" for name in signals}),
        ("weights of the signals", {name: f"signal_weight/{name}" for name in signals}),
        (
            "sample weights",
            {
                "correctly labelled, mean": "weight/right",
                "mislabelled, mean": "weight/wrong",
                "label noise seen": "label_noise",
            },
        ),
    )
    epochs = range(1, len(history) + 1)
    for panel, (name, lines) in zip(panels, groups, strict=True):
        for label, key in lines.items():
            if key in history[0]:
                panel.plot(epochs, [values[key] for values in history], label=label)
        panel.set_title(name, fontsize=10)
        panel.set_ylim(bottom=0.0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    for panel in panels[3:]:
        panel.set_xlabel("epoch")
    figure.savefig(path, dpi=110)
