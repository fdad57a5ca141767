"""What DynCIM has to reach, and whether the stored runs say that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .methods import CEILING
from .results import Cell, Runs, epochs_to_baseline, measure, probes
from .statistics import Estimate, Scores, best, difference, estimate, ranks

OURS = "dyncim"
EARN = ("dyncim/no-modality-level", "dyncim/no-gate")
NOISY = ("symmetric-40", "asymmetric-30")
MISSING = ("swap-100", "absent-100")


class Bar(NamedTuple):
    """A bar, whether it is met (``None``: no runs to tell), and what each case shows."""

    name: str
    met: bool | None
    cases: str


Found = Mapping[tuple[str, str], Runs]


def peers(cell: Cell) -> dict[str, Mapping[int, float]]:
    """Scores of the methods that are no ablation."""
    return {name: scores for name, scores in cell.scores.items() if "/" not in name}


def compared(found: Iterable[Cell]) -> list[Cell]:
    """The cells that have every method that any of them has: the best of a few is no best."""
    every = list(found)
    names = {name for cell in every for name in peers(cell)}
    return [cell for cell in every if names == set(peers(cell))]


def lead(cell: Cell) -> tuple[str, Estimate] | None:
    """The best other method, by its mean, and the paired difference of DynCIM to it."""
    others = peers(cell)
    ours = others.pop(OURS, None)
    if ours is None or not others:
        return None
    other = best(others)
    return other, difference(ours, others[other])


def mean_ranks(found: Iterable[Cell]) -> tuple[dict[str, float], int]:
    """Mean rank of each method over the cells that have them all, and how many have."""
    ranked = [ranks(peers(cell)) for cell in compared(found)]
    if not ranked:
        return {}, 0
    means = {name: float(np.mean([r[name] for r in ranked])) for name in ranked[0]}
    return dict(sorted(means.items(), key=lambda item: item[1])), len(ranked)


def bars(found: Found, all_cells: list[Cell]) -> list[Bar]:
    """Every bar."""
    order, count = mean_ranks(all_cells)
    first = next(iter(order), None)
    whole = compared(all_cells)
    trained = [cell for cell in whole if not cell.tested]
    clean = [cell for cell in trained if cell.condition == "clean"]
    most = {cell.data: highest(peers(cell)) for cell in clean if peers(cell)}
    ceilings = {
        (cell.data, cell.condition): estimate(cell.scores[CEILING]).mean
        for cell in all_cells
        if CEILING in cell.scores and cell.condition.startswith("absent")
    }
    return [
        Bar(
            "mean rank first over all conditions",
            None if first is None else first == OURS,
            "" if first is None else f"{first} is first over {count} conditions",
        ),
        _leads(
            "clean: interval of the difference to the best other reaches 0, mean >= -0.3",
            clean,
            lambda gap: gap.high >= 0 and gap.mean >= -0.3,
        ),
        _leads(
            "40% symmetric and 30% asymmetric label noise: +5 over the best other",
            (cell for cell in trained if cell.condition in NOISY and cell.data != "diabetes"),
            lambda gap: gap.mean >= 5,
            lambda cell: most.get(cell.data),
            "the best clean score",
        ),
        _leads(
            "swap and absent with three or more modalities: +3 over the best other",
            (c for c in whole if c.tested and c.condition in MISSING and c.data.count("+") > 1),
            lambda gap: gap.mean >= 3,
            lambda cell: ceilings.get((cell.data, cell.condition)),
            "networks trained for what is present",
        ),
        _probes(found),
        _convergence(found),
        _audit(found),
        _earned(all_cells),
    ]


def _leads(
    name: str,
    chosen: Iterable[Cell],
    reached: Callable[[Estimate], bool],
    most: Callable[[Cell], float | None] = lambda cell: None,
    of: str = "",
) -> Bar:
    """Where there is a most that one can hope for, say how far the best other is from it."""
    cases = []
    for cell in chosen:
        found = lead(cell)
        if found is not None:
            other, gap = found
            note = other
            limit = most(cell)
            if limit is not None:
                room = limit - estimate(cell.scores[other]).mean
                note += f"; {room:.1f} to {of}"
            text = f"{cell.data} {cell.title} {gap.mean:+.1f} ± {gap.half:.1f} ({note})"
            cases.append((reached(gap), text))
    return _bar(name, cases)


def highest(scores: Mapping[str, Scores]) -> float:
    """The largest mean of a method."""
    return max(estimate(values).mean for values in scores.values())


def _earned(all_cells: list[Cell]) -> Bar:
    """Over the cells in percent: the errors of the regression are on another scale."""
    cases = []
    for name in EARN:
        gaps = [
            difference(cell.scores[name], cell.scores[OURS])
            for cell in all_cells
            if {OURS, name} <= cell.scores.keys() and cell.data != "diabetes"
        ]
        if gaps:
            mean = float(np.mean([gap.mean for gap in gaps]))
            below, above = sum(gap.high < 0 for gap in gaps), sum(gap.low > 0 for gap in gaps)
            text = f"{name.partition('/')[2]} {mean:+.2f} over {len(gaps)} conditions"
            verdict = f"{text}, interval below 0 in {below}, above in {above}"
            cases.append((mean < 0 and below > above, verdict))
    return _bar(
        "ablation: below the whole, in the mean and in more intervals than above it",
        cases if len(cases) == len(EARN) else [],
    )


def _probes(found: Found) -> Bar:
    """Of each task's worst modality: the interval of the difference to ``single`` reaches 0."""
    cases = []
    for (data, condition), runs in found.items():
        if condition == "clean" and {OURS, "single"} <= runs.keys():
            name, gap = worst_probe(runs, OURS)
            cases.append((gap.high >= 0, f"{data} {name} {gap.mean:+.1f} ± {gap.half:.1f}"))
    return _bar("probe of the worst modality not below training it alone (clean)", cases)


def worst_probe(runs: Runs, method: str) -> tuple[str, Estimate]:
    """The modality whose probe loses most against ``single``, and the paired difference."""
    alone = probes(runs, "single")
    gaps = {name: difference(x, alone[name]) for name, x in probes(runs, method).items()}
    return min(gaps.items(), key=lambda item: item[1].mean)


def _convergence(found: Found) -> Bar:
    runs = found.get(("starving", "clean"), {})
    cases = []
    if {OURS, "uniform"} <= runs.keys():
        ours, base = (  # infinite if a seed never gets there
            float(np.mean(list(epochs_to_baseline(runs, name).values())))
            for name in (OURS, "uniform")
        )
        cases.append((ours <= 0.8 * base, f"{ours:.1f} epochs, uniform {base:.1f}"))
    return _bar("starving task: 0.8 of the epochs of uniform to 95% of its final score", cases)


def _audit(found: Found) -> Bar:
    cases = []
    for (data, condition), runs in found.items():
        ours, other = (measure(runs, x).get(OURS) for x in ("audit", "audit_other"))
        if ours and other:
            gap = difference(ours, other)
            cases.append((gap.mean >= 0, f"{data} {condition} {gap.mean:+.3f} ± {gap.half:.3f}"))
    return _bar("label audit: AUROC at or above cleanlab's score in every cell", cases)


def _bar(name: str, cases: list[tuple[bool, str]]) -> Bar:
    failed_first = sorted(cases, key=lambda case: case[0])
    text = "; ".join(("" if met else "**") + t + ("" if met else "**") for met, t in failed_first)
    return Bar(name, all(met for met, _ in cases) if cases else None, text)
