"""Facts of the package as a whole: names, imports, documentation, and what a step may do."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dyncim_core
from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion, audit, gates, modality, signals
from dyncim_core import reference as ref

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dyncim_core"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
# Imports go one way: a module may import from those before it.
NATIVE = "dyncim_core.kernels._native"  # C
LAYERS = (
    ("_units", "_checks", "_buffers", "kernels.interface", "kernels._native", "reference"),
    ("signals", "modality", "audit"),
    ("gates",),
    ("kernels.eager",),
    ("kernels.native", "kernels.triton"),
    ("kernels",),
    ("heads", "state", "moments"),
    ("fusion", "loss"),
    ("",),
)


def short(module: str) -> str:
    return module.removeprefix("dyncim_core").removeprefix(".")


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports from."""
    path = PACKAGE.joinpath(*short(module).split(".")) if short(module) else PACKAGE
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dyncim_core"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in (*MODULES, NATIVE)} or {node.module or ""}
    return {short(name) for name in found}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    level = next(k for k, names in enumerate(LAYERS) if short(module) in names)
    below = {name for names in LAYERS[:level] for name in names}
    assert imports(module) <= below


@pytest.mark.parametrize("module", [signals, modality, gates, audit, ref])
def test_every_public_function_is_listed_and_documented(module: Any) -> None:
    functions = {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    assert functions <= set(module.__all__)
    for name in functions:
        text = inspect.getdoc(getattr(module, name)) or ""
        assert "Returns:" in text, name
        assert ">>>" in text, name
        if module is not ref:
            assert name in dyncim_core.__all__
            assert name in ref.__all__, f"{name} has no specification"
            ours, theirs = (
                list(inspect.signature(getattr(where, name)).parameters) for where in (module, ref)
            )
            assert ours == theirs


def test_public_names_exist() -> None:
    assert sorted(dyncim_core.__all__) == list(dyncim_core.__all__)
    assert all(hasattr(dyncim_core, name) for name in dyncim_core.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str) -> None:
    import math

    if module.endswith(".triton"):
        pytest.importorskip("triton", minversion="3.3")
    names = {"torch": torch, "nn": nn, "math": math}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert result.failed == 0


def test_readme_snippets_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102


def test_reference_needs_numpy_alone() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('r', {str(PACKAGE / 'reference.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and 'dyncim_core' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_no_extras() -> None:
    code = "import sys, dyncim_core\nassert not {'triton', 'matplotlib'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_provenance_is_stated_honestly() -> None:
    for path in (*PACKAGE.rglob("*.py"), ROOT / "README.md"):
        text = path.read_text().lower()
        assert "paper's equation" not in text, path
        assert "paper's formula" not in text, path


class NoHostReads(TorchDispatchMode):
    """Rejects operators that make the host wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} reads on the host"
        if name in ("index", "index_put", "index_put_"):
            masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool]
            assert not masks, "indexing by a mask reads on the host"
        return func(*args, **(kwargs or {}))


def training_step(soft: bool = False, by: Any = None, **options: Any) -> Callable[[], Tensor]:
    state = CurriculumState(["a", "b"], num_samples=20)
    criterion = DynCIMLoss(by or nn.CrossEntropyLoss(), state=state, **options)
    fusion = GatedFusion({"a": 3, "b": 4}, state=state, swap=0.3, dropout=0.3)
    head = nn.Linear(7, 5)

    def step() -> Tensor:
        features = {"a": torch.randn(8, 3), "b": torch.randn(8, 4)}
        unimodal = {name: torch.randn(8, 5, requires_grad=True) for name in "ab"}
        present = torch.rand(8, 2) > 0.2
        fused, _, logits = fusion(features, unimodal=unimodal, present=present)
        target = torch.rand(8, 5) if soft else torch.randint(5, (8,))
        index = torch.randperm(20)[:8]
        loss = criterion(
            head(fused) + logits, target, unimodal=unimodal, present=present, index=index
        )
        loss.backward()
        return loss

    return step


def by_itself(logits: Tensor, target: Tensor) -> Tensor:
    """A criterion other than ``nn.CrossEntropyLoss``."""
    return nn.functional.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("held_out", [0.0, 0.4])
@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}, {"soft": True}, {"by": by_itself}], ids=str
)
def test_a_training_step_reads_nothing_on_the_host(
    options: dict[str, Any], held_out: float
) -> None:
    step = training_step(held_out=held_out, **options)
    step()
    with NoHostReads():
        step()


def test_inference_reads_nothing_on_the_host() -> None:
    fusion = GatedFusion({"a": 3, "b": 100})
    features = {"a": torch.randn(8, 3), "b": torch.randn(8, 100)}
    fusion(features)
    with NoHostReads():
        fusion.eval()(features, unimodal={name: torch.randn(8, 5) for name in "ab"})


def test_the_detector_detects() -> None:
    values = torch.ones(3)
    with NoHostReads():
        for read in (lambda: values.sum().item(), lambda: values[values > 0], values.nonzero):
            with pytest.raises(AssertionError, match="on the host"):
                read()


@pytest.mark.parametrize("options", [{}, {"soft": True}, {"by": by_itself}], ids=str)
def test_a_training_step_runs_without_data(options: dict[str, Any]) -> None:
    """Fake tensors hold no values: whatever branched on one would raise."""
    with FakeTensorMode():
        step = training_step(held_out=0.4, **options)
        assert step().shape == ()
