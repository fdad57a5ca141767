from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from numpy import int64
from numpy.testing import assert_allclose
from torch import Tensor, nn

from dyncim_core import CurriculumState, DynCIMLoss, GatedFusion
from dyncim_core.kernels import eager

SAMPLES = 120
CLASSES = 4


def step(criterion: DynCIMLoss, seed: int, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    fused, a, b = torch.randn(3, 10, CLASSES, generator=generator).unbind()
    target = torch.randint(CLASSES, (10,), generator=generator)
    index = torch.randperm(SAMPLES, generator=generator)[:10]
    loss = criterion(
        fused.requires_grad_(), target, unimodal={"a": a, "b": b}, index=index, **options
    )
    assert isinstance(loss, Tensor)
    return loss


def trained(steps: int = 6, **options: Any) -> DynCIMLoss:
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=["a", "b"], num_samples=SAMPLES, **options
    )
    for seed in range(steps):
        step(criterion, seed)
    return criterion


@pytest.mark.parametrize("modalities", [["a", "b"], None])
def test_a_saved_state_continues_bit_for_bit(modalities: list[str] | None) -> None:
    criterion = trained()
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    resumed = DynCIMLoss(nn.CrossEntropyLoss(), modalities=modalities, num_samples=SAMPLES)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(6, 12):
        assert torch.equal(step(criterion, seed), step(resumed, seed))
    for name, value in criterion.state.named_buffers():
        assert torch.equal(resumed.state.get_buffer(name), value), name


def test_names_that_a_checkpoint_does_not_hold_are_told_once() -> None:
    saved = CurriculumState(["a", "b"]).state_dict()
    state = CurriculumState()
    state.load_state_dict(saved)
    assert state.modalities == ("0", "1")
    with pytest.raises(ValueError, match=r"expected \['0', '1'\] as settled before, got \['a'\]"):
        state.settle_modalities(["a"])
    state.settle_modalities(2)  # by a fusion over positions
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=CurriculumState())
    criterion.state.load_state_dict(saved)
    logits, target = torch.zeros(3, 4), torch.arange(3)
    criterion(logits, target, unimodal={"a": logits, "b": logits})
    assert criterion.state.modalities == ("a", "b")
    numbered = DynCIMLoss(nn.CrossEntropyLoss())
    numbered.state.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"expected the modalities \['0', '1'\]"):
        numbered.eval()(logits, target, unimodal=dict.fromkeys("abc", logits))
    for other in ({"b": logits, "c": logits}, {"a": logits}):
        with pytest.raises(ValueError, match=r"expected the modalities \['a', 'b'\]"):
            criterion(logits, target, unimodal=other)


def test_a_state_made_on_the_meta_device_starts_as_any() -> None:
    with torch.device("meta"):
        criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=3)
        model = nn.ModuleList([criterion, GatedFusion([4, 5], state=criterion.state)])
    for buffer in model.to_empty(device="cpu").buffers():
        buffer.copy_(torch.full_like(buffer, 7))  # anything
    criterion.state.reset_parameters()
    model[1].reset_parameters()
    plain = DynCIMLoss(nn.CrossEntropyLoss(), modalities=2, num_samples=3)
    expected = nn.ModuleList([plain, GatedFusion([4, 5], state=plain.state)])
    expected, found = expected.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_reset_parameters_forgets() -> None:
    state = trained().state
    state.reset_parameters()
    fresh = CurriculumState(["a", "b"], num_samples=SAMPLES)
    assert all(torch.equal(x, y) for x, y in zip(state.buffers(), fresh.buffers(), strict=True))


def test_all_state_is_in_buffers() -> None:
    state = CurriculumState(2, num_samples=3)
    assert not list(state.parameters())
    assert set(dict(state.named_buffers())) == set(state.state_dict())


def test_a_checkpoint_of_other_modalities_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for log_quality"):
        CurriculumState(3).load_state_dict(CurriculumState(2).state_dict())


def test_what_a_checkpoint_said_of_modalities_is_revised_by_another() -> None:
    state = CurriculumState(num_samples=10)
    with pytest.raises(RuntimeError, match="size mismatch for memory_nll"):
        state.load_state_dict(CurriculumState(3, num_samples=20).state_dict())
    for modalities in (2, 4, None):
        saved = CurriculumState(modalities, num_samples=10)
        saved.log_quality.fill_(-0.5)
        state.load_state_dict(saved.state_dict())
        assert len(state.modalities or ()) == (modalities or 0)
        for name, value in saved.named_buffers():
            assert torch.equal(state.get_buffer(name), value)
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), state=state)
    logits, target = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])
    criterion(logits, target, unimodal={"a": logits}, index=target)
    assert state.modalities == ("a",)
    with pytest.raises(RuntimeError, match="size mismatch for log_quality"):  # a call has said it
        state.load_state_dict(CurriculumState(2, num_samples=10).state_dict())


def test_averages_follow_their_definition() -> None:
    """One sample of certain heads: log quality is minus its NLL, averaged with the decay."""
    state = CurriculumState(1, decay=0.75)

    def update(nll: float, signal: float, doubt: bool) -> None:
        eager.take_in(
            torch.full((2, 1), nll),
            torch.full((3,), signal),
            torch.tensor(doubt),
            torch.ones(2, 1),
            torch.tensor(1),
            4,
            state.averages(),
            state.decay,
            holds_out=False,
        )

    update(1.0, 0.4, True)
    assert state.log_quality.tolist() == [-1.0, -1.0]
    assert_allclose(state.quality, 1 - 1 / math.log(4), rtol=1e-6)
    assert state.volatility.tolist() == [0.0] * 3
    assert state.label_noise == 0.25  # from 0: a first doubt is not believed whole
    update(0.0, 0.8, False)
    assert state.log_quality.tolist() == [-0.75, -0.75]
    assert_allclose(state.signal_mean, 0.75 * 0.4 + 0.25 * 0.8, rtol=1e-6)
    assert_allclose(state.volatility, 0.4 / 0.401, rtol=1e-5)
    assert_allclose(state.label_noise, 0.75 * 0.25)
    update(0.0, 0.5, False)
    assert_allclose(state.volatility, 0.75 * 0.4 / 0.401, atol=1e-6)
    assert state.step == 3
    assert state.seen.tolist() == [3, 3]


def test_qualities_are_those_of_the_weighted_samples() -> None:
    state = CurriculumState(1)
    eager.take_in(
        torch.tensor([[1.0, 5.0], [2.0, 9.0]]),
        torch.zeros(3),
        torch.tensor(0.0),
        torch.tensor([[2.0, 0.0], [2.0, 0.0]]),
        torch.tensor(2),
        10,
        state.averages(),
        state.decay,
        holds_out=False,
    )
    assert state.log_quality.tolist() == [-1.0, -2.0]
    assert state.effective_share == 0.5


def test_a_modality_not_yet_seen_counts_as_the_fusion() -> None:
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=["a", "b"], num_samples=SAMPLES)
    present = torch.ones(10, 2, dtype=torch.bool)
    present[:, 1] = False
    step(criterion, 0, present=present)
    state = criterion.state
    assert state.log_quality[2] == state.log_quality[0]
    assert state.seen.tolist() == [1, 1, 0]
    step(criterion, 1)
    assert state.seen.tolist() == [2, 2, 1]
    assert state.log_quality[2] != state.log_quality[0]


def test_memory_keeps_average_visits_and_weight() -> None:
    criterion = trained(8)
    state = criterion.state
    visits = state.memory_visits
    assert visits.sum() == 8 * 10 * 3
    assert (state.memory_nll[visits == 0] == 0).all()
    assert (state.memory_nll[visits > 0] > 0).all()
    assert (state.memory_weight[visits[:, 0] == 0] == 1).all()


def test_memory_is_the_running_average_of_the_nll() -> None:
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(),
        state=CurriculumState(num_samples=2, memory_decay=0.5),
    )
    for logit in (0.0, 1.0):
        logits = torch.tensor([[logit, 0.0]], requires_grad=True)
        criterion(logits, torch.tensor([0]), index=torch.tensor([1]))
    expected = 0.5 * math.log(2) + 0.5 * math.log1p(math.exp(-1.0))
    assert_allclose(criterion.state.memory_nll, [[0.0], [expected]], rtol=1e-6)


def test_suspects_rank_wrong_labels_and_corrupted_inputs() -> None:
    """Sample 3 has a wrong label; the second modality of sample 5 is another sample's."""
    target = torch.arange(SAMPLES) % CLASSES
    right = 6.0 * nn.functional.one_hot(target, CLASSES).float()
    corrupted = right.clone()
    corrupted[5] = corrupted[6]
    labels = target.clone()
    labels[3] = (target[3] + 1) % CLASSES
    criterion = DynCIMLoss(nn.CrossEntropyLoss(), modalities=["a", "b"], num_samples=SAMPLES)
    for _ in range(5):
        criterion(
            right.requires_grad_(),
            labels,
            unimodal={"a": right, "b": corrupted},
            index=torch.arange(SAMPLES),
        )
    state = criterion.state
    assert state.suspects(1).indices.tolist() == [3]
    assert state.suspects(1, modality="b").indices.tolist() == [5]
    assert state.suspects(1, modality=1).indices.tolist() == [5]
    assert state.suspects(modality="a").indices[-1] == 5
    assert state.suspects().scores.diff().max() <= 0


def test_a_wrong_label_is_no_corrupted_input() -> None:
    state = CurriculumState(2, num_samples=3)
    nll = [[2.0, 6.0, 3.0], [1.0, 3.0, 0.1], [0.0, 0.5, 0.1]]
    state.memory_nll.copy_(torch.tensor(nll))
    state.memory_visits.fill_(1)
    suspects = state.suspects(modality=0)
    assert suspects.indices.tolist() == [1, 2, 0]
    expected = [3.0 * math.exp(-0.1), 0.5 * math.exp(-0.1), 6.0 * math.exp(-3.0)]
    assert_allclose(suspects.scores, expected, rtol=1e-6)
    assert state.suspects().indices[0] == 0


def test_a_label_that_fusion_learnt_by_heart_stays_suspect() -> None:
    state = CurriculumState(2, num_samples=3)
    state.memory_nll.copy_(torch.tensor([[0.1, 0.1, 0.2], [0.0, 0.0, 3.0], [0.3, 9.0, 0.4]]))
    state.memory_visits.fill_(1)
    state.memory_visits[2, 1] = 0  # the modality was never there
    suspects = state.suspects()
    assert suspects.indices.tolist() == [1, 2, 0]
    assert_allclose(suspects.scores, [1.0, 0.35, 0.4 / 3], rtol=1e-6)


def test_a_head_counts_for_suspicion_by_the_eighth_power_of_its_skill() -> None:
    state = CurriculumState(2, num_samples=2)
    state.memory_nll.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.05, 0.0, 5.0]]))
    state.memory_visits.fill_(1)
    assert state.suspects().indices.tolist() == [1, 0]
    state.skill.copy_(torch.tensor([0.8, 0.6, 0.0]))  # the last learns by heart
    suspects = state.suspects()
    assert suspects.indices.tolist() == [0, 1]
    total = 0.8**8 + 0.6**8 + 0.02**8
    expected = [0.6**8 / total, (0.05 * 0.8**8 + 5.0 * 0.02**8) / total]
    assert_allclose(suspects.scores, expected, rtol=1e-6)


def test_what_looked_wrong_for_long_is_not_forgotten_at_once() -> None:
    """At first the memory is the mean of all visits, however soon a label is known by heart."""
    target, index = torch.tensor([0, 1]), torch.arange(2)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), state=CurriculumState(1, num_samples=2, memory_decay=0.75)
    )
    mean = 0.0
    for step in range(7):
        logits = torch.tensor([[0.0, 4.0 - step], [0.0, 4.0]]).requires_grad_()
        criterion(logits, target, unimodal=[logits], index=index)
        lost = float(nn.functional.cross_entropy(logits.detach()[0], target[0]))
        mean += max(1.0 / (step + 1), 0.25) * (lost - mean)
        assert_allclose(criterion.state.memory_nll[0], [mean] * 2, rtol=1e-5)


def test_samples_never_seen_come_last() -> None:
    suspects = trained(1).state.suspects()
    assert suspects.scores[10:].isneginf().all()
    assert suspects.scores[:10].isfinite().all()
    assert sorted(suspects.indices.tolist()) == list(range(SAMPLES))


def test_summary_names_every_quantity() -> None:
    summary = trained(3).state.summary()
    expected = {"step", "nonfinite", "label_noise", "effective_share", "temperature"}
    expected |= {"gmr", "hmir", "balance_factor", "redundancy"}
    expected |= {"quality/fused", "skill/fused", "logit_weight/fused"}
    expected |= {
        f"{kind}/{name}"
        for kind in ("quality", "skill", "logit_weight", "modality_weight")
        for name in "ab"
    }
    signals = ("deviation", "consistency", "stability")
    expected |= {f"{kind}/{name}" for kind in ("signal", "signal_weight") for name in signals}
    assert set(summary) == expected
    assert summary["step"] == 3.0
    assert summary["temperature"] == pytest.approx(1.0 / summary["logit_weight/fused"])
    assert_allclose(sum(summary[f"signal_weight/{name}"] for name in signals), 1.0, rtol=1e-6)
    assert_allclose(summary["modality_weight/a"] + summary["modality_weight/b"], 1.0, rtol=1e-6)
    assert "gmr" not in CurriculumState().summary()


def test_state_keeps_its_dtype() -> None:
    state = trained(2).state
    before = {name: value.clone() for name, value in state.named_buffers()}
    for module in (state.half(), state.double(), state.to(torch.bfloat16)):
        for name, value in module.named_buffers():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])


def test_modalities_are_settled_once() -> None:
    state = CurriculumState(num_samples=3)
    state.settle_modalities(["a", "b"])
    assert state.log_quality.shape == (3,)
    assert state.memory_nll.shape == state.memory_visits.shape == (3, 3)
    state.settle_modalities(["a", "b"])
    with pytest.raises(ValueError, match=r"modalities: expected \['a', 'b'\].*got \['b', 'a'\]"):
        state.settle_modalities(["b", "a"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k: expected a whole number in \[1, 120\], got 0"),
        ({"k": 121}, ValueError, r"k: expected a whole number in \[1, 120\], got 121"),
        ({"k": True}, ValueError, r"k: expected a whole number in \[1, 120\], got True"),
        ({"k": 1.5}, ValueError, r"k: expected a whole number in \[1, 120\], got 1.5"),
        ({"modality": "x"}, ValueError, r"modality: expected one of \['a', 'b'\], got 'x'"),
        ({"modality": 2}, ValueError, r"modality: expected one of \['a', 'b'\], got 2"),
    ],
)
def test_suspects_out_of_range(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trained(1).state.suspects(**options)


def test_one_modality_has_no_other_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="modality: expected another modality"):
        CurriculumState(["a"], num_samples=3).suspects(modality="a")


def test_numpy_counts_are_whole_numbers() -> None:
    state = CurriculumState(int64(2), num_samples=int64(5))
    assert state.modalities == ("0", "1")
    assert state.memory_weight.shape == (5,)


def test_suspects_need_a_memory() -> None:
    with pytest.raises(RuntimeError, match="num_samples="):
        CurriculumState(2).suspects()


@pytest.mark.parametrize("name", ["decay", "memory_decay"])
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_decays_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected a value in \[0, 1\), got"):
        CurriculumState(**{name: value})


def test_suspects_of_nothing_are_refused() -> None:
    state = CurriculumState(2, num_samples=4)
    with pytest.raises(RuntimeError, match=r"suspects: expected samples .*pass index= to the loss"):
        state.suspects(2)


def test_no_modality_is_named_as_the_fused_head() -> None:
    with pytest.raises(ValueError, match=r"modalities: expected names other than .*'fused'"):
        CurriculumState(["audio", "fused"])


def test_a_fresh_state_has_no_weighting() -> None:
    assert CurriculumState().summary()["effective_share"] == 1.0


def test_a_default_dtype_is_not_that_of_the_state() -> None:
    expected = {name: x.dtype for name, x in CurriculumState(2, num_samples=3).named_buffers()}
    torch.set_default_dtype(torch.float64)
    try:
        state = CurriculumState(2, num_samples=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: x.dtype for name, x in state.named_buffers()} == expected


@pytest.mark.parametrize("names", [["a", "a"], ["fused"], 0])
def test_modalities_settled_later_are_checked(names: Any) -> None:
    state = CurriculumState()
    with pytest.raises(ValueError, match="modalities: expected"):
        state.settle_modalities(names)
    assert state.modalities is None


def test_modalities_settled_later_count_in_full() -> None:
    state = CurriculumState()
    fusion = GatedFusion([2, 2], state=state, dropout=0.0)
    logits = fusion([torch.ones(3, 2)] * 2, unimodal=[torch.ones(3, 4)] * 2).logits
    assert_allclose(logits, 2.0)
    expected = dict(CurriculumState(2).named_buffers())
    assert all(torch.equal(x, expected[name]) for name, x in state.named_buffers())


def test_what_cannot_be_compared_is_not_suspected() -> None:
    state = CurriculumState(2, num_samples=3)
    state.memory_nll.copy_(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.5, 0.5]]))
    state.memory_visits.copy_(torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]]))
    scores = state.suspects(modality=0).scores
    assert scores.isneginf().tolist() == [False, True, True]


def test_a_summary_is_exact_and_of_the_heads_that_it_names() -> None:
    state = CurriculumState(["a", "b"])
    state.step.fill_(2**24 + 1)
    for name in ("quality", "skill", "logit_weight"):
        state.get_buffer(name).copy_(torch.tensor([0.25, 0.5, 0.75]))
    summary = state.summary()
    assert summary["step"] == 2**24 + 1
    for name in ("quality", "skill", "logit_weight"):
        assert (summary[f"{name}/a"], summary[f"{name}/b"]) == (0.5, 0.75)


def test_positions_do_not_count_from_the_end() -> None:
    state = CurriculumState(2, num_samples=3)
    state.memory_visits.fill_(1)
    with pytest.raises(ValueError, match=r"modality: expected one of .* got -1"):
        state.suspects(modality=-1)
    with pytest.raises(
        ValueError, match=r"modality: expected one of .* got True; a position is in"
    ):
        state.suspects(modality=True)
    assert torch.equal(state.suspects(modality=int64(1)).scores, state.suspects(modality=1).scores)


def test_a_checkpoint_may_hold_no_modalities() -> None:
    state = CurriculumState()
    state.load_state_dict(CurriculumState().state_dict())
    state.load_state_dict({}, strict=False)
    assert state.modalities is None


@pytest.mark.parametrize("too_sure", [0.6, 4.0])
def test_temperature_makes_probabilities_of_logits(too_sure: float) -> None:
    """Of logits too sure by a known factor, held against targets that are not trained on."""
    generator = torch.Generator().manual_seed(0)
    true = 2.0 * torch.randn(4000, CLASSES, generator=generator)
    target = true.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    index = torch.arange(2000)
    criterion = DynCIMLoss(
        nn.CrossEntropyLoss(), modalities=1, num_samples=2000, held_out=0.5, surprise_strength=0
    )
    assert criterion.state.temperature == 1.0
    logits = too_sure * true
    nothing = torch.zeros(2000, CLASSES).requires_grad_()  # of a modality that tells nothing
    for _ in range(300):
        criterion(
            logits[:2000].clone().requires_grad_(), target[:2000], unimodal=[nothing], index=index
        )
    scaled = logits[2000:] / criterion.state.temperature
    as_is, least, found = (
        nn.functional.cross_entropy(x, target[2000:]) for x in (logits[2000:], true[2000:], scaled)
    )
    assert found - least < 0.05 * (as_is - least)
