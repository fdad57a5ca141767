"""Finished runs as CSV, one row each, one file for each suite."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .conditions import TEST_CONDITIONS
from .config import STUDY, Config
from .train import Measures

Row = Mapping[str, str]

_CONFIG = ("data", "condition", "method", "setting", "seed", "epochs")
_MEASURES = ("score", "ece", "ece_scaled", "worst_probe", *TEST_CONDITIONS, "audit", "audit_other")
_REST = ("audit_other_by", "ms_per_step", "seconds", "probes", "curve", "label_noise")
FIELDS = ("key", "study", *_CONFIG, *_MEASURES, *_REST, "commit", "torch", "numpy", "python")


class Store:
    """The runs of every suite in a folder.

    A file is replaced as a whole, so that an interrupted run leaves no trace.

    Attributes:
        folder: Where ``SUITE.csv`` lie.
        rows: Every finished run by key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path.stem: _read(path) for path in sorted(folder.glob("*.csv"))}
        self.rows: dict[str, Row] = {
            row["key"]: row
            for rows in self._files.values()
            for row in rows
            if row.get("study") == str(STUDY)
        }

    def add(self, suite: str, config: Config, measures: Measures) -> None:
        """Store a finished run, with what it was run on."""
        values = {**asdict(config), **measures, **_environment()}
        row = dict.fromkeys(FIELDS, "") | {"key": config.key, "study": str(STUDY)}
        row |= {name: _text(value) for name, value in values.items()}
        self.rows[config.key] = row
        rows = self._files.setdefault(suite, [])
        rows.append(row)
        path = self.folder / f"{suite}.csv"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)


def number(row: Row, measure: str) -> float:
    """A measure of a run, NaN where it has none."""
    return float(row[measure] or "nan")


def _read(path: Path) -> list[Row]:
    """Rows of before a measure was added lack it."""
    with path.open(newline="") as file:
        return [dict.fromkeys(FIELDS, "") | row for row in csv.DictReader(file)]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@lru_cache(maxsize=1)
def _environment() -> dict[str, str]:
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The checked-out commit, with a + where the package or the study differ from it."""
    if shutil.which("git") is None:
        return ""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603 (fixed arguments)
            ["git", *arguments],  # noqa: S607 (whichever git the user has)
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", "../../dyncim_core")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
