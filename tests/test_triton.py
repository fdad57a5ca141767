"""Triton's kernels: on a GPU where there is one, else in Triton's interpreter, on the CPU.

The interpreter has to be on before triton is imported, so this file has its own process:
``TRITON_INTERPRET=1 python -m pytest tests/test_triton.py``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from specification import CASES as RUNS
from specification import SKILLS, run_at_skills
from specification import run as run_of_the_specification
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion, held_out, kernels
from dyncim_core import reference as ref
from dyncim_core.kernels import eager
from dyncim_core.kernels.interface import Criterion, Gate, Kept, Learnt, Settings

ON_GPU = torch.cuda.is_available()
if ON_GPU:  # or nothing would be compiled
    os.environ.pop("TRITON_INTERPRET", None)
elif os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", minversion="3.3")
from dyncim_core.kernels import triton as kernel  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
on_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
# Where a GPU masks in silence, NumPy warns of what it computes in masked lanes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FIELDS = ("loss", "nll", "entropy", "distance")


@pytest.fixture(params=[False, True], ids=["one pass", "many passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and batches that fit what a program has in hand, and ones that do not."""
    if request.param:
        monkeypatch.setattr(kernel, "_MOST_LANES", 4)
        monkeypatch.setattr(kernel, "_TILE", 32)
        monkeypatch.setattr(kernel, "_PLANE", 16)


def case(
    heads: int,
    batch: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    weight: bool = False,
    smoothing: float = 0.0,
    absent: bool = False,
    strided: bool = False,
    ruled: bool = False,
    seed: int = 0,
) -> SimpleNamespace:
    """Heads, a mask whose absent rows hold NaN, and a criterion, with ignored samples.

    With ``ruled``, the last head rules out classes that are no target.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(heads, batch, classes, generator=generator)
    present = None
    if absent:
        present = torch.rand(heads, batch, generator=generator) < 0.7
        present[0] = True
        logits[~present] = math.nan
    target = torch.randint(classes, (batch,), generator=generator)
    if ruled:
        out = torch.rand(batch, classes, generator=generator) < 0.3
        out[torch.arange(batch), target] = False
        logits[-1][out] = -math.inf
    target[1::4] = -1
    rows = [x.to(DEVICE, dtype) for x in logits]
    if strided:  # every second row of one with more columns, and a transposed one
        rows = [F.pad(x.repeat_interleave(2, dim=0), (0, 3))[::2, :classes] for x in rows]
        rows[-1] = rows[-1].t().contiguous().t()
    class_weight = torch.rand(classes, generator=generator) + 0.1 if weight else None
    return SimpleNamespace(
        logits=rows,
        present=None if present is None else present.to(DEVICE),
        criterion=Criterion(
            target.to(DEVICE),
            None if class_weight is None else class_weight.to(DEVICE),
            -1,
            smoothing,
        ),
    )


CASES = [
    {"heads": 1, "classes": 2},
    {"heads": 2, "classes": 1, "smoothing": 0.1, "absent": True},
    {"heads": 2, "classes": 6, "weight": True, "smoothing": 1.0, "strided": True},
    {"heads": 3, "classes": 101, "weight": True, "absent": True},
    {"heads": 3, "classes": 101, "dtype": torch.bfloat16, "smoothing": 0.1, "strided": True},
    {"heads": 4, "classes": 101, "dtype": torch.float16, "weight": True, "smoothing": 0.1},
    {"heads": 9, "classes": 6, "absent": True, "strided": True},
    {"heads": 2, "classes": 1000, "weight": True, "smoothing": 0.1, "absent": True},
]
all_cases = pytest.mark.parametrize("options", CASES, ids=lambda x: f"{x['heads']}x{x['classes']}")


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = max(1.0, float(expected.double().nan_to_num().abs().max())) if expected.numel() else 1.0
    assert_allclose(
        actual.cpu().double(), expected.cpu().double(), rtol=tolerance, atol=tolerance * scale
    )


@all_cases
@pytest.mark.usefixtures("passes")
def test_statistics_are_those_of_the_reference_and_of_eager(options: dict[str, Any]) -> None:
    c = case(batch=6, **options)
    ours = kernel.statistics(c.logits, c.present, c.criterion)
    theirs = eager.statistics(c.logits, c.present, c.criterion)
    assert ours.rows.dtype == torch.float32
    close(ours.rows, theirs.rows)
    here = torch.ones_like(ours.prediction).bool() if c.present is None else c.present
    assert torch.equal(ours.prediction[here], theirs.prediction[here])

    target, weight, ignore_index, smoothing = c.criterion
    expected = ref.head_statistics(
        [x.double().cpu().numpy() for x in c.logits],
        target.cpu().numpy(),
        present=None if c.present is None else c.present.cpu().numpy(),
        weight=None if weight is None else weight.double().cpu().numpy(),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )
    for row, name in zip(ours.rows, FIELDS, strict=True):
        close(row, torch.from_numpy(getattr(expected, name)))


@all_cases
@pytest.mark.usefixtures("passes")
def test_gradients_are_those_of_cross_entropy_in_float64(options: dict[str, Any]) -> None:
    c = case(batch=6, **options)
    target, weight, ignore_index, smoothing = c.criterion
    found = kernel.statistics(c.logits, c.present, c.criterion)
    here = torch.ones_like(found.rows[0]) if c.present is None else c.present.float()
    coefficient = here * torch.linspace(0.5, 2.0, here.numel(), device=DEVICE).view_as(here)
    upstream = torch.linspace(-1.0, 3.0, here.shape[1], device=DEVICE)
    args = c.logits, c.criterion, c.present is not None
    ours = kernel.gradients(upstream, coefficient, found.normaliser, *args)
    for h, (grad, head) in enumerate(zip(ours, c.logits, strict=True)):
        leaf = torch.where(here[h].bool()[:, None], head, 0.0).double().requires_grad_()
        losses = F.cross_entropy(
            leaf,
            target,
            None if weight is None else weight.double(),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=smoothing,
        )
        (truth,) = torch.autograd.grad((upstream * coefficient[h] * losses).sum(), leaf)
        assert grad.dtype == head.dtype
        precision = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[head.dtype]
        assert (grad - truth).norm() <= 1.1 * precision * truth.norm() + 1e-6
        assert not grad[here[h] == 0].any()
        assert not grad[target == ignore_index].any()


def test_gradient_takes_a_scalar_one_for_each_sample_or_one_for_each_loss() -> None:
    c = case(3, 6, 5)
    normaliser = kernel.statistics(c.logits, None, c.criterion).normaliser
    factor = torch.rand(6, 3, device=DEVICE).t()  # not contiguous
    full = torch.rand(6, 3, device=DEVICE).t()
    for grad in (full.mean(), full[1], full, torch.ones((), device=DEVICE).expand(3, 6)):
        for coefficient in (None, factor):
            args = c.logits, c.criterion, False
            ours = kernel.gradients(grad, coefficient, normaliser, *args)
            theirs = eager.gradients(grad.expand(3, 6), coefficient, None, *args)
            for x, y in zip(ours, theirs, strict=True):
                close(x, y, 1e-6)


@pytest.mark.usefixtures("passes")
def test_hard_rows() -> None:
    """Masked classes count for nothing; what is not finite shows, in that row alone."""
    inf, nan = math.inf, math.nan
    rows = torch.randn(9, 101, generator=torch.Generator().manual_seed(1))
    rows[0, :60] = -inf  # the first blocks hold nothing
    rows[1, 60:] = -inf
    rows[2] *= 1e4
    rows[3] = 1e4
    rows[4] = torch.linspace(-1.0, 1.0, 101) * 3e38
    rows[5, 77] = nan
    rows[6, 77] = inf
    rows[7] = -inf
    finite = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 1], dtype=torch.bool, device=DEVICE)
    rows = rows.to(DEVICE)
    target = torch.full((9,), 70, device=DEVICE)
    target[1] = 30
    logits, criterion = [rows.flip(0), rows], Criterion(target)
    found = kernel.statistics(logits, None, criterion)
    expected = eager.statistics(logits, None, criterion)
    assert torch.equal(found.rows[2, 1].isfinite(), finite)
    assert torch.equal(found.rows[:, 1].isfinite(), expected.rows[:, 1].isfinite())
    close(found.rows[:3, 1, finite], expected.rows[:3, 1, finite])
    both = finite & finite.flip(0)
    close(found.rows[3, 1, both], expected.rows[3, 1, both])
    assert torch.equal(found.prediction[1, finite], expected.prediction[1, finite])

    coefficient = finite.float().expand(2, -1) * finite.flip(0)
    one = torch.ones((), device=DEVICE)
    args = logits, criterion
    grads = kernel.gradients(one, coefficient, found.normaliser, *args, True)
    for x, y in zip(grads, eager.gradients(coefficient, None, None, *args, True), strict=True):
        close(x, y, 1e-6)
        assert not x[~both].any()
    (_, unguarded) = kernel.gradients(one, coefficient, found.normaliser, *args, False)
    assert unguarded[5:7].isnan().any(dim=1).all()


def test_the_first_of_equal_classes_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(4, 101, device=DEVICE)
    logits[1, [40, 80]] = 1.0
    logits[2, 33:] = 1.0
    logits[3, 7] = -1.0
    for most in (4, 512):
        monkeypatch.setattr(kernel, "_MOST_LANES", most)
        criterion = Criterion(torch.zeros(4, dtype=torch.int64, device=DEVICE))
        prediction = kernel.statistics([logits], None, criterion).prediction
        assert prediction.tolist() == [[0, 40, 33, 0]]


@pytest.mark.usefixtures("passes")
def test_heads_that_nearly_agree_are_at_a_small_distance() -> None:
    """The expansion of the square would be off by 1e-4 here."""
    generator = torch.Generator().manual_seed(2)
    fused = 20.0 * torch.randn(3, 1000, generator=generator)
    logits = [fused, fused + 1e-3 * torch.randn(3, 1000, generator=generator), fused + 1.0]
    logits = [x.to(DEVICE) for x in logits]
    criterion = Criterion(torch.zeros(3, dtype=torch.int64, device=DEVICE))
    distance = kernel.statistics(logits, None, criterion).rows[3]
    truth = eager.statistics([x.double() for x in logits], None, criterion).rows[3]
    assert (distance - truth).abs().max() < 1e-6


def test_a_target_out_of_range_gives_nan_and_harms_no_other() -> None:
    c = case(2, 6, 5)
    bad = c.criterion.target.clone()
    bad[0], bad[2] = 5, 2**40
    found = kernel.statistics(c.logits, None, c.criterion._replace(target=bad))
    good = kernel.statistics(c.logits, None, c.criterion)
    wrong = bad != c.criterion.target
    assert found.rows[:2, :, wrong].isnan().all()
    assert torch.equal(found.rows[:, :, ~wrong], good.rows[:, :, ~wrong])
    assert torch.equal(found.rows[2:], good.rows[2:])


def _scaled(x: Tensor, scale: float) -> Tensor:
    """With its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(scale * x)


def run(backend: Any, dtype: torch.dtype, c: SimpleNamespace, settings: Settings) -> Any:
    """What three steps give, and the state that they leave."""
    state = CurriculumState(len(c.logits) - 1 or 2, num_samples=50).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    given = []
    for scale in (1.0, 1.5, 0.7):  # or volatilities would be those of rounding
        index = torch.randperm(50, generator=generator)[: len(c.logits[0])].to(DEVICE)
        joint = backend.curriculum(
            [_scaled(x.to(dtype), scale) for x in c.logits],
            c.present,
            c.criterion,
            state.averages(),
            state.memory(index) if scale != 1.5 or settings.held_out else None,
            settings,
        )
        given += [joint.value, joint.coefficient]
    return given, dict(state.named_buffers())


@pytest.mark.parametrize(
    ("options", "skip", "reduction", "noise", "share"),
    [
        ({"heads": 1, "classes": 5}, False, "mean", 0.4, 0.0),
        ({"heads": 2, "classes": 5, "weight": True, "smoothing": 0.1}, False, "mean", None, 0.0),
        ({"heads": 3, "classes": 5, "absent": True}, True, "mean", 0.1, 0.0),
        ({"heads": 4, "classes": 1}, False, "sum", 0.4, 0.3),
        ({"heads": 3, "classes": 11, "weight": True, "absent": True}, True, "none", 0.4, 0.0),
        ({"heads": 9, "classes": 3, "absent": True}, False, "none", None, 0.3),
        ({"heads": 3, "classes": 40, "absent": True, "strided": True}, True, "mean", None, 0.3),
        ({"heads": 2, "classes": 600, "ruled": True, "strided": True}, False, "sum", None, 0.3),
    ],
)
@pytest.mark.parametrize("corrupt", [False, True])
@pytest.mark.usefixtures("passes")
def test_curriculum_is_that_of_eager(
    options: dict[str, Any],
    skip: bool,
    reduction: Any,
    noise: float | None,
    share: float,
    corrupt: bool,
) -> None:
    c = case(batch=21, **options)
    if corrupt:
        c.logits[0][0] = math.nan
    settings = Settings(4.0, noise, 0.2, 0.5, skip, 0.9, 0.8, reduction, share)
    ours, mine = run(kernel, torch.float32, c, settings)
    theirs, others = run(eager, torch.float32, c, settings)
    truths, true = run(eager, torch.float64, c, settings)
    # Standardising amplifies rounding: nobody has to be nearer to the truth than eager is.
    for actual, plain, truth in zip(ours, theirs, truths, strict=True):
        assert_no_further(actual, plain, truth)
    for name in true:
        assert_no_further(mine[name], others[name], true[name])


def assert_no_further(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert actual.shape == truth.shape
    assert torch.equal(actual.isnan(), truth.isnan())
    actual, plain, truth = (x.double().nan_to_num() for x in (actual, plain, truth))
    scale = 1.0 + truth.abs()
    allowed = 3.0 * ((plain - truth).abs() / scale).max() + 1e-4
    assert ((actual - truth).abs() / scale).max() <= allowed


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.usefixtures("passes")
def test_a_run_is_that_of_the_specification(options: dict[str, Any]) -> None:
    for name, actual, expected in run_of_the_specification(kernel, DEVICE, **options):
        assert_allclose(actual.cpu(), expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("skills", SKILLS, ids=str)
@pytest.mark.usefixtures("passes")
def test_losses_count_by_skill(skills: list[float]) -> None:
    found, expected = run_at_skills(kernel, DEVICE, skills)
    assert_allclose(found.cpu(), expected, rtol=1e-6)


@pytest.mark.usefixtures("passes")
def test_losses_count_as_far_as_what_is_learnt_holds() -> None:
    lost = [0.5, 0.3, 0.6, 0.9, 5.0, math.nan]
    found, expected = run_at_skills(kernel, DEVICE, [0.9] * 6, lost)
    assert_allclose(found.cpu(), expected, rtol=1e-5)


def test_the_hash_tells_what_is_held_out() -> None:
    """Indices out of range are passed over, so that any will do."""
    generator = torch.Generator().manual_seed(0)
    index = torch.cat(
        [torch.arange(200)]
        + [torch.randint(2**bits, (200,), generator=generator) for bits in (31, 32, 33, 62)]
    ).to(DEVICE)
    state = CurriculumState(1, num_samples=200).to(DEVICE)
    settings = Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "mean", 0.3)
    logits = [torch.zeros(len(index), 2, device=DEVICE)] * 2
    criterion = Criterion(torch.zeros_like(index))
    joint = kernel.curriculum(
        logits, None, criterion, state.averages(), state.memory(index), settings
    )
    held = held_out(index, 0.3)
    assert torch.equal(joint.coefficient == 0.0, held.expand(2, -1))

    logits, rows = [x[held] for x in logits], index[held]
    criterion = Criterion(torch.zeros_like(rows))
    joint = kernel.curriculum(
        logits, None, criterion, state.averages(), state.memory(rows), settings
    )
    assert joint.value == 0.0  # of a batch held out as a whole
    assert not joint.coefficient.any()


def test_modalities_of_any_lag_get_the_coefficients_of_eager() -> None:
    """Ratios far outside of what exp can hold, and modalities ahead of the fusion."""
    criterion = Criterion(torch.zeros(4, dtype=torch.int64, device=DEVICE))
    settings = Settings(0.0, None, 0.0, 1.0, False, 0.9, 0.8, "sum")
    for losses in (
        (5, 5, 5),
        (5, 5.001, 4.9),
        (5, 5.001, 5.5),
        (0, 200, 190),
        (90, 3, 40),
        (3, 33, 33),
        (1000, 5, 5),
        (-9, 40, 1),
    ):
        logits = [torch.tensor([0.0, loss], device=DEVICE).expand(4, 2) for loss in losses]
        states = [CurriculumState(2).to(DEVICE) for _ in range(2)]
        ours, theirs = (
            backend.curriculum(logits, None, criterion, state.averages(), None, settings)
            for backend, state in zip((kernel, eager), states, strict=True)
        )
        close(ours.coefficient, theirs.coefficient)


@pytest.mark.parametrize("surprise", [95.0, 3000.0])
@pytest.mark.parametrize("at", [0, 299])
def test_a_modality_of_next_to_weightless_samples_is_as_bad_as_it_is(
    surprise: float, at: int
) -> None:
    logits = torch.zeros(300, 3, device=DEVICE)
    logits[at, 0] = surprise
    present = torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
    present[1] = logits[:, 0] > 0.0
    criterion = Criterion(torch.ones(300, dtype=torch.int64, device=DEVICE))
    settings = Settings(2.0, 1.0, 0.2, 1.0, False, 0.9, 0.8, "sum")
    state = CurriculumState(1).to(DEVICE)
    kernel.curriculum([logits] * 2, present, criterion, state.averages(), None, settings)
    assert state.seen.tolist() == [1, 1]
    assert_allclose(state.log_quality[1].cpu(), -surprise, rtol=1e-5)


def test_signals_that_stand_still_have_no_volatility() -> None:
    c = case(3, 60, 5)
    state = CurriculumState(2).to(DEVICE)
    settings = Settings(2.0, None, 0.2, 1.0, False, 0.9, 0.8, "mean")
    for _ in range(4):
        kernel.curriculum(c.logits, None, c.criterion, state.averages(), None, settings)
    assert not state.volatility.any()


def test_the_memory_of_what_is_hopeless_is_bounded() -> None:
    logits = [torch.tensor([[1e31, 0.0]] * 2, device=DEVICE)] * 2
    state = CurriculumState(1, num_samples=60).to(DEVICE)
    index = torch.arange(60, device=DEVICE)
    index = torch.stack([index[held_out(index, 0.3)][0], index[~held_out(index, 0.3)][0]])
    settings = Settings(0.0, None, 0.2, 1.0, False, 0.9, 0.8, "mean", 0.3)
    target = torch.ones(2, dtype=torch.int64, device=DEVICE)
    for _ in range(3):
        kernel.curriculum(
            logits, None, Criterion(target), state.averages(), state.memory(index), settings
        )
    assert_allclose(state.memory_nll[index].cpu(), 1e30, rtol=1e-6)
    assert state.held_out_averages.isfinite().all()
    # What the fused logits say beyond the modality's is nothing, which neither helps nor harms.
    weights = (1.0 - 0.1 * 10 / (0.3 * 60 + 10)) ** 3, 0.02 + 0.98 * 0.9**3
    assert_allclose(state.logit_weight.cpu(), weights, rtol=1e-6)


def test_losses_whose_sum_overflows_count() -> None:
    logits = [torch.tensor([[2e38, 0.0]] * 2, device=DEVICE)] * 2
    state = CurriculumState(1).to(DEVICE)
    target = torch.ones(2, dtype=torch.int64, device=DEVICE)
    settings = Settings(0.0, None, 0.0, 1.0, False, 0.9, 0.8, "mean", 0.0)
    kernel.curriculum(logits, None, Criterion(target), state.averages(), None, settings)
    assert state.nonfinite == 0
    assert_allclose(state.log_quality.cpu(), -1e30, rtol=1e-6)


def test_two_runs_of_one_batch_are_alike_in_every_bit() -> None:
    """Weights are summed in whole numbers, in whatever order threads come."""
    found = []
    generator = torch.Generator()
    for order in (torch.arange(64), torch.arange(63, -1, -1)):
        generator.manual_seed(0)
        state = CurriculumState(1).to(DEVICE)
        logits = [x[order].to(DEVICE) for x in 4.0 * torch.randn(2, 64, 3, generator=generator)]
        target = (torch.arange(64) % 3)[order].to(DEVICE)
        settings = Settings(2.0, 1.0, 0.0, 1.0, False, 0.9, 0.8, "mean", 0.0)
        kernel.curriculum(logits, None, Criterion(target), state.averages(), None, settings)
        found.append(state.log_class_average)
    assert torch.equal(*found)


def test_qualities_far_apart_leave_the_farthest_a_coefficient() -> None:
    log_quality = [-440.0, -400.0, -642.0]
    state = CurriculumState(2)
    state.log_quality.copy_(torch.tensor(log_quality))
    state.seen.fill_(10**6)
    joint = kernel.curriculum(
        [torch.zeros(1, 2, device=DEVICE)] * 3,
        None,
        Criterion(torch.zeros(1, dtype=torch.int64, device=DEVICE)),
        state.to(DEVICE).averages(),
        None,
        Settings(0.0, None, 0.0, 1.0, False, 1.0 - 1e-12, 0.8, "sum"),
    )
    expected = ref.modality_coefficients(log_quality)
    assert_allclose(joint.coefficient[1:, 0].cpu(), expected, rtol=1e-4)


def test_what_is_absent_has_coefficient_0_where_no_class_has_weight() -> None:
    weight = torch.tensor([0.0, 1.0], device=DEVICE)
    criterion = Criterion(torch.zeros(2, dtype=torch.int64, device=DEVICE), weight)
    present = torch.tensor([[True, True], [True, False]], device=DEVICE)
    settings = Settings(2.0, None, 0.2, 1.0, False, 0.9, 0.8, "mean")
    logits = [torch.zeros(2, 2, device=DEVICE)] * 2
    averages = CurriculumState(1).to(DEVICE).averages()
    joint = kernel.curriculum(logits, present, criterion, averages, None, settings)
    assert joint.coefficient[1, 1] == 0.0


@pytest.mark.parametrize("batch", [0, 3])
def test_a_batch_that_says_nothing_moves_nothing(batch: int) -> None:
    logits = [torch.zeros(batch, 5, device=DEVICE) for _ in range(3)]
    criterion = Criterion(torch.full((batch,), -100, device=DEVICE))
    settings = Settings(4.0, 0.2, 0.2, 0.5, False, 0.9, 0.8, "sum")
    state, other = CurriculumState(2).to(DEVICE), CurriculumState(2).to(DEVICE)
    joint = kernel.curriculum(logits, None, criterion, state.averages(), None, settings)
    eager.curriculum(logits, None, criterion, other.averages(), None, settings)
    assert joint.value == 0.0
    assert state.step == 1
    assert not state.seen.any()
    assert not state.label_noise.any()
    assert all(torch.equal(x, y) for x, y in zip(state.buffers(), other.buffers(), strict=True))
    one = torch.ones((), device=DEVICE)
    args = joint.coefficient, joint.normaliser, logits, criterion, False
    assert not any(x.any() for x in kernel.gradients(one, *args))


@pytest.mark.parametrize(("swap", "dropout"), [(0.0, 0.0), (0.4, 0.4), (0.0, 0.6)])
@pytest.mark.parametrize("options", [CASES[0], *CASES[3:7]], ids=str)
@pytest.mark.usefixtures("passes")
def test_gates_are_those_of_eager(options: dict[str, Any], swap: float, dropout: float) -> None:
    c = case(batch=21, **options)
    c.logits[0][3] = math.nan
    if c.present is not None:
        c.present[:, 5:7] = False
        c.present[0, 6] = True
        c.logits[0][6] = math.nan
    modalities, generator = len(c.logits), torch.Generator().manual_seed(1)
    chance = learnt = penalty = None
    if swap or dropout:
        chance = torch.rand(3, 21, generator=generator).to(DEVICE)
        quality = torch.linspace(0.9, 0.1, 1 + modalities, device=DEVICE)
        known = torch.linspace(0.9, 0.8, 1 + modalities, device=DEVICE)  # redundant, for the most
        seen = torch.randint(4, 9, (1024,), generator=generator).to(DEVICE)
        seen[7] = 0
        weight = seen.sqrt() + 0.1
        learnt = Learnt(0.1 * known.log(), quality, known, seen, weight, quality.flip(0))
    if not swap:
        penalty = 9.0 * torch.rand(21, modalities, generator=generator).t().to(DEVICE)
    settings = Gate(3.0, 0.2, swap, dropout)
    skill = torch.linspace(0.0, 0.9, modalities, device=DEVICE)
    prior = -3.0 * torch.rand(1024, generator=generator).to(DEVICE)
    kept = [Kept(skill.clone(), torch.ones_like(skill), prior.clone()) for _ in range(2)]
    ours, theirs = (
        b.gate(c.logits, of, learnt, c.present, chance, penalty, settings)
        for b, of in zip((kernel, eager), kept, strict=True)
    )
    for x, y in zip(*kept, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(ours[2:], theirs[2:], strict=True):
        assert x is y is None or torch.equal(x, y)
    if modalities > 1 and dropout:  # and some are
        known = Kept(skill.clone(), torch.ones_like(skill), prior.clone())
        undropped = settings._replace(dropout=0.0)
        plain = eager.gate(c.logits, known, learnt, c.present, chance, penalty, undropped)
        assert not torch.equal(plain.gates, theirs.gates)
        assert not swap or (theirs.source != torch.arange(21, device=DEVICE)).any()
    close(ours.gates, theirs.gates)
    close(ours.scale, theirs.scale)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A building block that is told "triton" takes it, on a CPU as well."""
    monkeypatch.setattr(kernels, "_load", lambda name: (kernel, "available"))
    monkeypatch.setattr(kernels, "_fastest", lambda logits: "triton")


@pytest.mark.usefixtures("chosen")
def test_the_building_blocks_train_as_in_plain_torch() -> None:
    def train(backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        state = CurriculumState(["a", "b"], num_samples=40)
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state, backend=backend).to(DEVICE)
        fusion = GatedFusion({"a": 3, "b": 4}, state=state, backend=backend).to(DEVICE)
        found = []
        for _ in range(3):
            features = {k: torch.randn(8, n, generator=generator) for k, n in (("a", 3), ("b", 4))}
            logits = [2 * torch.randn(8, 5, generator=generator) for _ in range(3)]
            target = torch.randint(5, (8,), generator=generator).to(DEVICE)
            index = torch.randperm(40, generator=generator)[:8].to(DEVICE)
            heads = [x.to(DEVICE).requires_grad_() for x in logits]
            unimodal = dict(zip("ab", heads[1:], strict=True))
            torch.manual_seed(0)
            with NoHostReads():
                fused, gates, _ = fusion(
                    {k: x.to(DEVICE) for k, x in features.items()}, unimodal=unimodal
                )
                loss = criterion(heads[0], target, unimodal=unimodal, index=index)
                loss.backward()
            found += [fused.detach(), gates, loss.detach(), *(x.grad for x in heads)]
        return [*found, *state.buffers()]

    for ours, theirs in zip(train("triton"), train("eager"), strict=True):
        close(ours, theirs)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoDevice:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(NoDevice())
launch, compiled = JITFunction.run, []
def compile_only(self, *args, warmup, **options):
    compiled.append(launch(self, *args, warmup=True, **options))
JITFunction.run = compile_only

from dyncim_core import CurriculumState
from dyncim_core.kernels import triton as kernel
from dyncim_core.kernels.interface import Criterion, Gate, Kept, Settings

target, present = torch.zeros(4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.bool)
logits = [torch.zeros(4, 40), torch.zeros(4, 40).bfloat16(), torch.zeros(4, 40).half()]
state = CurriculumState(2, num_samples=9)
for criterion, mask, memory, known, chance in (
    (Criterion(target), None, None, None, None),
    (Criterion(target, torch.ones(40), -100, 0.1), present, state.memory(target), 0.3,
     torch.rand(3, 4)),
):
    settings = Settings(4.0, known, 0.2, 0.5, mask is not None, 0.9, 0.8,
                        "mean" if mask is None else "none", 0.0 if memory is None else 0.05)
    joint = kernel.curriculum(logits, mask, criterion, state.averages(), memory, settings)
    args = torch.ones(()), joint.coefficient, joint.normaliser, logits, criterion
    kernel.gradients(*args, mask is not None)
    penalty = None if chance is None else torch.ones(3, 4)
    gate = Gate(1.5, 0.05, 0.1, 0.1)
    prior = None if chance is None else torch.zeros(1024)
    kept = Kept(torch.ones(3), torch.ones(3), prior)
    kernel.gate(logits, kept, None, mask, chance, penalty, gate)
settings = Settings(4.0, None, 0.2, 0.5, False, 0.9, 0.8, "mean", 0.05)
kernel.curriculum(
    logits, None, Criterion(target), state.averages(), state.memory(target), settings
)
assert len(compiled) == 12 and all("cubin" in kernel.asm for kernel in compiled)
"""


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Any) -> None:
    """The interpreter takes Python that the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)


@pytest.mark.usefixtures("chosen")
def test_negated_views_keep_their_sign() -> None:
    """Their memory holds the other."""
    heads = [torch.randn(6, 5, device=DEVICE, requires_grad=True) for _ in range(3)]
    target, weight = torch.arange(6, device=DEVICE) % 5, torch.rand(5, device=DEVICE)
    found = []
    for backend, class_weight in (("triton", torch._neg_view(-weight)), ("eager", weight)):
        criterion = DynCIMLoss(nn.CrossEntropyLoss(class_weight), modalities=2, backend=backend).to(
            DEVICE
        )
        loss = criterion(heads[0], target, unimodal=heads[1:])
        factor = torch.complex(torch.zeros_like(loss), torch.ones_like(loss)).conj().imag
        assert factor.is_neg()
        found.append((loss.detach(), *torch.autograd.grad(loss, heads, factor)))
    for x, y in zip(*found, strict=True):
        close(x, y)


@pytest.mark.usefixtures("chosen")
def test_logits_without_memory_are_given_some() -> None:
    found = []
    for backend, empty in (("triton", torch._efficientzerotensor), ("eager", torch.zeros)):
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=1, backend=backend).to(DEVICE)
        fused = torch.ones(4, 3, device=DEVICE, requires_grad=True)
        target = torch.arange(4, device=DEVICE) % 3
        found.append(criterion(fused, target, unimodal=[empty((4, 3), device=DEVICE)]).detach())
    close(*found)


@pytest.mark.usefixtures("chosen")
def test_buffers_that_lie_otherwise_are_refused() -> None:
    heads = [torch.randn(6, 5, device=DEVICE, requires_grad=True) for _ in range(3)]
    target = torch.arange(6, device=DEVICE) % 5
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, backend="triton").to(DEVICE)
    averages = criterion.state.held_out_averages
    averages.data = torch.zeros(averages.shape[::-1], device=DEVICE).t()
    with pytest.raises(
        TypeError, match=r"state: expected contiguous buffers, got strides \(1, 7\)"
    ):
        criterion(heads[0], target, unimodal=heads[1:])
    criterion.state.seen.data = criterion.state.seen[:2].clone()
    with pytest.raises(ValueError, match=r"state: expected buffers of 3 heads, got 2"):
        criterion(heads[0], target, unimodal=heads[1:])
    assert criterion.state.step == 0


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch's own
def test_a_step_is_captured_in_a_graph_and_reads_nothing_on_the_host() -> None:
    torch.manual_seed(0)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=2, num_samples=128, backend="triton"
    ).cuda()
    index = torch.arange(64, device="cuda")
    heads = [torch.randn(64, 101, device="cuda", requires_grad=True) for _ in range(3)]
    target = torch.randint(101, (64,), device="cuda")

    def step() -> tuple[Tensor, ...]:
        loss = criterion(heads[0], target, unimodal=heads[1:], index=index)
        # Detached: what is left of its graph would tie a capture to the stream it was made on.
        return (loss.detach(), *torch.autograd.grad(loss, heads))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    start = {name: x.clone() for name, x in criterion.state.named_buffers()}
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for name, x in criterion.state.named_buffers():
        x.copy_(start[name])
    graph.replay()
    for x, y in zip(found, expected, strict=True):
        close(x, y)
