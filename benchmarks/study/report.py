"""Tables and pictures from the stored runs. Every verdict in them is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .bars import OURS, bars, compared, lead, mean_ranks, worst_probe
from .config import Config
from .results import Cell, Runs, cells, epochs_to_baseline, gather, measure
from .statistics import Estimate, Scores, difference, estimate
from .store import Row

Found = dict[tuple[str, str], Runs]


def write(configs: Sequence[Config], rows: dict[str, Row], folder: Path, name: str) -> Path:
    """Write ``NAME.md`` and its pictures; return where it is."""
    found = gather(configs, rows)
    if not found:
        raise ValueError("report: expected finished runs of these suites, found none")
    from . import pictures  # the extra "study"

    everything = cells(found)
    drawn = []
    if pictures.draw_leads(everything, folder / f"{name}-leads.png"):
        drawn.append(f"![DynCIM minus the best other method]({name}-leads.png)")
    starving = found.get(("starving", "clean"), {})
    if pictures.draw_curves(starving, "starving, clean", folder / f"{name}-starving.png"):
        drawn.append(f"![Accuracy over the epochs of the starving task]({name}-starving.png)")
    if pictures.draw_label_noise(found, folder / f"{name}-label-noise.png"):
        drawn.append(f"![Label noise seen over training]({name}-label-noise.png)")
    parts = [
        _header(configs, rows, name),
        _section("Bars", _bars(found, everything)),
        _section("Mean rank", _ranks(everything)),
        _section("DynCIM minus the best other method", _leads(everything)),
        *(_section(f"Scores: {data}", text) for data, text in _scores(everything)),
        _section("Ablation", _ablation(everything)),
        _section("Probes of the encoders", _probes(found)),
        _section("Convergence", _convergence(found)),
        _section("Calibration", _calibration(found)),
        _section("Label audit", _audit(found)),
        _section("Cost of a step", _cost(found)),
        "\n\n".join(drawn),
    ]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; nothing without lines."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    if not body:
        return ""
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *body])


def number(value: Estimate, digits: int = 1, sign: bool = False) -> str:
    """Mean ± half width; the mean alone of a single seed."""
    text = f"{value.mean:{'+' if sign else ''}.{digits}f}"
    return text if not np.isfinite(value.half) else f"{text} ± {value.half:.{digits}f}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _header(configs: Sequence[Config], rows: dict[str, Row], name: str) -> str:
    done = [rows[config.key] for config in configs if config.key in rows]
    seen = {
        field: ", ".join(sorted({row[field] for row in done}))
        for field in ("commit", "torch", "numpy", "python")
    }
    versions = "; ".join(f"{field} {values}" for field, values in seen.items())
    return (
        f"# Study: {name}\n\n"
        f"{len(done)} of {len(configs)} runs; {versions}.\n\n"
        "Scores after the last epoch: accuracy in percent, for diabetes minus the mean absolute "
        "error. Mean ± half width of the 95% interval over seeds; differences are paired by seed. "
        "The best other method is the one with the largest mean of the row, picked after the "
        "fact, which favours it."
    )


def _bars(found: Found, everything: list[Cell]) -> str:
    words = {True: "yes", False: "**no**", None: "no runs"}
    lines = [(bar.name, words[bar.met], bar.cases) for bar in bars(found, everything)]
    return table(("bar", "met", "cases (failed ones bold)"), lines)


def _ranks(everything: list[Cell]) -> str:
    """Over all conditions, and over those of each kind."""
    groups: dict[str, list[Cell]] = {"all": everything}
    for cell in everything:
        groups.setdefault(kind(cell), []).append(cell)
    ranked = {name: mean_ranks(group) for name, group in groups.items()}
    header = [f"{name}, {count}" for name, (_, count) in ranked.items()]
    lines = [
        (method, *(f"{ranks[method]:.2f}" if ranks else "" for ranks, _ in ranked.values()))
        for method in ranked["all"][0]
    ]
    return table(("mean rank over conditions", *header), lines)


def kind(cell: Cell) -> str:
    """What goes wrong, in a word or two."""
    if cell.tested:
        return f"{cell.condition.partition('-')[0]} at test"
    if cell.condition == "clean":
        return "clean"
    noisy = cell.condition.startswith(("symmetric", "asymmetric"))
    return "label noise" if noisy else "other training data"


def _leads(everything: list[Cell]) -> str:
    """DynCIM minus the best other method of each task, over the tasks of accuracy."""
    groups: dict[str, list[Estimate]] = {}
    for cell in compared(everything):
        found = lead(cell)
        if found is not None and cell.data != "diabetes":
            groups.setdefault(cell.title, []).append(found[1])
    lines = []
    for title, gaps in groups.items():
        means = [gap.mean for gap in gaps]
        above, below = sum(gap.low > 0 for gap in gaps), sum(gap.high < 0 for gap in gaps)
        middle = f"{np.median(means):+.1f}"
        span = f"{min(means):+.1f} to {max(means):+.1f}"
        lines.append((title, str(len(gaps)), middle, span, str(above), str(below)))
    header = ("condition", "tasks", "median", "from, to", "interval above 0", "below 0")
    return table(header, lines)


def _scores(everything: list[Cell]) -> Iterable[tuple[str, str]]:
    """What lacks a method has no best other one."""
    whole = compared(everything)
    for data in dict.fromkeys(cell.data for cell in everything):
        chosen = [cell for cell in everything if cell.data == data]
        methods = [m for m in dict.fromkeys(m for c in chosen for m in c.scores) if "/" not in m]
        lines = []
        for cell in chosen:
            gap = lead(cell) if cell in whole else None
            last = "" if gap is None else f"{number(gap[1], sign=True)} ({gap[0]})"
            lines.append([cell.title, *_row(cell.scores, methods), last])
        yield data, table(("condition", *methods, f"{OURS} - best other"), lines)


def _row(scores: Mapping[str, Scores], methods: Sequence[str]) -> list[str]:
    found = {name: estimate(scores[name]) for name in methods if name in scores}
    largest = max((value.mean for value in found.values()), default=float("nan"))
    return [
        ""
        if name not in found
        else f"**{number(found[name])}**"
        if found[name].mean == largest
        else number(found[name])
        for name in methods
    ]


def _ablation(everything: list[Cell]) -> str:
    """Each variant minus the whole; the mean is over accuracies, as in the bar."""
    chosen = [c for c in everything if OURS in c.scores and any(map(_is_variant, c.scores))]
    methods = list(dict.fromkeys(m for c in chosen for m in c.scores if _is_variant(m)))
    means: dict[str, list[float]] = {name: [] for name in methods}
    lines = []
    for cell in chosen:
        whole, texts = cell.scores[OURS], []
        for name in methods:
            gap = difference(cell.scores[name], whole) if name in cell.scores else None
            texts.append("" if gap is None else number(gap, sign=True))
            means[name] += [] if gap is None or cell.data == "diabetes" else [gap.mean]
        lines.append([cell.data, cell.title, number(estimate(whole)), *texts])
    if lines:
        texts = [f"{np.mean(x):+.2f}" if x else "" for x in means.values()]
        lines.append(["mean of accuracies", "", "", *texts])
    short = [name.partition("/")[2] for name in methods]
    return table(("data", "condition", "whole", *short), lines)


def _is_variant(method: str) -> bool:
    return method.startswith(f"{OURS}/")


def _probes(found: Found) -> str:
    """Per method and task: the modality whose probe loses most against training it alone."""
    tasks = {data: runs for (data, c), runs in found.items() if c == "clean" and "single" in runs}
    methods = list(dict.fromkeys(m for runs in tasks.values() for m in runs if "/" not in m))
    lines = []
    for method in methods:
        cells_ = []
        for runs in tasks.values():
            if method in runs:
                name, gap = worst_probe(runs, method)
                cells_.append(f"{number(gap, sign=True)} ({name})")
            else:
                cells_.append("")
        lines.append([method, *cells_])
    return table(("probe minus that of single, clean", *tasks), lines)


def _convergence(found: Found) -> str:
    """Where not all seeds get there, how many do; the mean is over those."""
    tasks = {
        data: runs
        for (data, condition), runs in found.items()
        if condition == "clean" and "uniform" in runs and measure(runs, "ece")
    }
    methods = list(dict.fromkeys(m for runs in tasks.values() for m in runs if "/" not in m))
    lines = []
    for method in methods:
        cells_ = []
        for runs in tasks.values():
            epochs = epochs_to_baseline(runs, method) if method in runs else {}
            reached = {seed: value for seed, value in epochs.items() if np.isfinite(value)}
            text = number(estimate(reached)) if reached else ""
            few = len(reached) < len(epochs)
            cells_.append(f"{text} ({len(reached)} of {len(epochs)} seeds)" if few else text)
        lines.append([method, *cells_])
    return table(("epochs to 95% of the final accuracy of uniform, clean", *tasks), lines)


def _calibration(found: Found) -> str:
    by_task = {key: measure(runs, "ece") for key, runs in found.items()}
    scaled = f"{OURS}, over its temperature"
    for key, runs in found.items():
        if values := measure(runs, "ece_scaled").get(OURS):
            by_task[key][scaled] = values
    return _by_method(by_task, "ECE, %", digits=1)


def _cost(found: Found) -> str:
    clean = {key: runs for key, runs in found.items() if key[1] == "clean"}
    by_task = {key: measure(runs, "ms_per_step") for key, runs in clean.items()}
    return _by_method(by_task, "ms", digits=2)


def _by_method(
    found: Mapping[tuple[str, str], Mapping[str, Scores]], title: str, digits: int
) -> str:
    by_task = {key: values for key, values in found.items() if values}
    methods = list(dict.fromkeys(m for x in by_task.values() for m in x if "/" not in m))
    lines = [
        (
            f"{data}, {condition}",
            *(number(estimate(x[m]), digits) if m in x else "" for m in methods),
        )
        for (data, condition), x in by_task.items()
    ]
    return table((title, *methods), lines)


def _audit(found: Found) -> str:
    lines = []
    for (data, condition), runs in found.items():
        ours, other = (measure(runs, x).get(OURS) for x in ("audit", "audit_other"))
        if ours and other:
            sources = ", ".join(sorted({row["audit_other_by"] for row in runs[OURS].values()}))
            gap = number(difference(ours, other), 3, sign=True)
            values = number(estimate(ours), 3), number(estimate(other), 3)
            lines.append((data, condition, *values, gap, sources))
    return table(("data", "condition", "DynCIM", "other", "difference", "other is"), lines)
