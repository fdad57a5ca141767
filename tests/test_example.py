"""The example, as a user calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "handwritten.py"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_short_run(tmp_path: Path) -> None:
    result = call(
        *("--views", "fou+zer+mor", "--seeds", "2", "--epochs", "8", "--train-size", "640"),
        *("--suspects", "50", "--jobs", "2", "--out", str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("| fou+zer+mor")]
    assert len(table) == 5
    swap = next(line for line in table if "swap" in line)
    joint, uniform, dyncim = (float(x) for x in re.findall(r"\| (\d+\.\d) ±", swap))
    assert dyncim > max(joint, uniform)
    found = re.search(r"(\d+) of the 50 most suspect samples were mislabelled", result.stdout)
    assert found is not None
    assert int(found[1]) > 40  # a blind guess finds 14
    for name in ("accuracies.png", "curriculum.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--views", "fou+zar"), "two or more different views of fou, fac, .* got 'fou\\+zar'"),
        (("--views", "fou"), "two or more different views"),
        (("--noise", "2"), "expected float in \\[0, 1\\], got '2'"),
        (("--seeds", "0"), "expected int in \\[1, 1000\\], got '0'"),
        (("--epochs", "many"), "expected int in"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = call("--out", str(file / "folder"))
    assert result.returncode == 2
    assert "argument --out: cannot write to" in result.stderr


def test_help() -> None:
    result = call("--help")
    assert result.returncode == 0
    for option in ("--views", "--noise", "--seeds", "--seed", "--epochs", "--jobs", "--out"):
        assert option in result.stdout
