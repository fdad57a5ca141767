"""Command line: ``python -m benchmarks.study --help``."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from . import report
from .choose import choose
from .conditions import CONDITIONS
from .config import Config
from .data import SPOKEN, family
from .methods import METHODS
from .store import Store, number
from .suites import SETTINGS, SUITES, configs, select
from .train import Measures, run

RESULTS = Path(__file__).parents[1] / "results" / "study"
# Of a run of one method at full length; measured ones replace them in the estimate.
SECONDS = {
    "uci": 2.0,
    "odd": 2.0,
    "digits": 4.0,
    "starving": 2.0,
    "dominated": 2.0,
    "overlap": 2.0,
    "rare": 1.5,
    "question": 2.0,
    "reference": 1.5,
    "common": 1.5,
    "drawn": 2.0,
    "together": 2.0,
    "diabetes": 1.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and do."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = options.out / SETTINGS
    if not settings.exists():
        settings = RESULTS / SETTINGS
    store = Store(options.out)
    try:
        if options.command == "run":
            _run(options, store, settings)
        elif options.command == "choose":
            for row in choose(configs("tuning", settings), store.rows, options.out / SETTINGS):
                print(*row.values(), sep="\t")
        else:
            wanted = [c for suite in options.suite for c in configs(suite, settings)]
            wanted = list(dict.fromkeys(wanted))
            print(report.write(wanted, store.rows, options.out, options.name))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f'error: {error}; pip install -e ".[study]"', file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, store: Store, settings: Path) -> None:
    wanted = select(
        configs(options.suite, settings),
        options.data,
        options.methods,
        options.conditions,
        options.seeds,
    )
    skipped = {config: reason for config in wanted if (reason := _missing(config, options))}
    for reason in dict.fromkeys(skipped.values()):
        print(f"skipped {list(skipped.values()).count(reason)} runs: {reason}")
    left = [c for c in wanted if c not in skipped and c.key not in store.rows]
    minutes = sum(_seconds(config, store) for config in left) / 60
    print(
        f"{options.suite}: {len(wanted) - len(skipped) - len(left)} runs finished, "
        f"{len(left)} to do, about {minutes:.0f} core-minutes"
    )
    if options.dry_run:
        return
    from tqdm import tqdm  # the extra "study"

    finished = _finish(left, options.jobs, options.spoken_digits)
    for config, measures in tqdm(finished, total=len(left), unit="run", disable=None):
        store.add(options.suite, config, measures)


def _finish(left: Sequence[Config], jobs: int, spoken: Path) -> Iterator[tuple[Config, Measures]]:
    """Runs in the order in which they finish."""
    if jobs == 1:
        yield from ((config, run(config, spoken)) for config in left)
        return
    context = multiprocessing.get_context("spawn")  # torch and fork do not mix
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(run, config, spoken): config for config in left}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _missing(config: Config, options: argparse.Namespace) -> str:
    """Why a run cannot be done here, if it cannot."""
    if config.data == "digits" and not options.spoken_digits.exists():
        return f"digits needs --spoken-digits, there is no {options.spoken_digits}"
    reason = METHODS[config.method].missing()
    return f"{config.method} {reason}" if reason else ""


def _seconds(config: Config, store: Store) -> float:
    """Median of the stored runs that are most like it, else a guess."""
    for like in (("data", "condition", "method"), ("data", "method"), ("data",)):
        wanted = [str(getattr(config, name)) for name in like] + [str(config.epochs)]
        found = [
            number(row, "seconds")
            for row in store.rows.values()
            if [row[name] for name in (*like, "epochs")] == wanted
        ]
        if found:
            return float(np.median(found))
    return SECONDS[family(config.data)] * CONDITIONS[config.condition].epochs


def _seeds(text: str) -> range:
    first, _, count = text.partition(":")
    try:
        return range(int(first), int(first) + int(count or 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected FIRST:COUNT, got {text!r}") from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description="The study: run it, tune it, report it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="do the runs of a suite that are not stored yet")
    running.add_argument("--suite", required=True, choices=SUITES)
    running.add_argument("--data", nargs="+", help="only these tasks")
    running.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    running.add_argument("--conditions", nargs="+", choices=CONDITIONS, metavar="CONDITION")
    running.add_argument("--seeds", type=_seeds, metavar="FIRST:COUNT", help="only these seeds")
    running.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    running.add_argument("--dry-run", action="store_true", help="count and estimate only")
    running.add_argument(
        "--spoken-digits", type=Path, default=SPOKEN, metavar="NPZ", help=f"default {SPOKEN}"
    )
    choosing = commands.add_parser("choose", help=f"write {SETTINGS} from the suite tuning")
    reporting = commands.add_parser("report", help="tables and pictures of stored runs")
    reporting.add_argument(
        "--suite",
        nargs="+",
        choices=SUITES,
        default=[name for name in SUITES if name not in ("smoke", "tuning")],
    )
    reporting.add_argument("--name", default="report", help="of the files written")
    for command in (running, choosing, reporting):
        command.add_argument(
            "--out", type=Path, default=RESULTS, help="folder of the results, default %(default)s"
        )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
