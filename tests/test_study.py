"""The study: what each method's paper states, what a condition does, what is measured."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncim_core
from benchmarks.study import bars, methods, report, statistics, suites
from benchmarks.study.__main__ import SECONDS, main
from benchmarks.study.conditions import CONDITIONS, TEST_CONDITIONS, corrupt_test, prepare
from benchmarks.study.config import Config
from benchmarks.study.data import EPOCHS, MARKS, SPOKEN, family, load
from benchmarks.study.measures import (
    auroc,
    calibration_error,
    doubt,
    epochs_to,
    probe,
    self_confidence,
)
from benchmarks.study.methods import METHODS, Method, Problem, Rehearsal
from benchmarks.study.models import (
    WIDTH,
    Concatenation,
    FamiliarLogits,
    Gated,
    GatedUnderShare,
    MeanOfLogits,
    MeanOfProbabilities,
    Network,
    OneModality,
)
from benchmarks.study.results import Cell, gather
from benchmarks.study.store import Store
from benchmarks.study.train import EPOCH, run

DATA = "uci:fou+zer+mor"
FAST = "uci:fou+mor"
LINEAR = partial(nn.Linear, out_features=4)


def problem(modalities: int = 2, samples: int = 10_000, hidden: int = 0) -> Problem:
    names = tuple(f"m{k}" for k in range(modalities))

    def network(fusion: methods.Fusion) -> Network:
        torch.manual_seed(0)
        return Network(dict.fromkeys(names, torch.Size([5])), 4, fusion, hidden)

    def rehearse(make: object, epochs: int) -> Rehearsal:
        heads = torch.arange(1.0, modalities + 2)
        return Rehearsal((heads, heads / 4), (heads, heads / 2), heads / 10)

    return Problem(
        names,
        samples,
        epochs=4,
        steps=40,
        network=network,
        rehearse=rehearse,
    )


def redundancy_of(state: dyncim_core.CurriculumState) -> Tensor:
    return dyncim_core.redundancy(state.log_quality, state.quality[0], state.skill)


def batch(modalities: int = 2, samples: int = 32) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(4, (samples,), generator=generator)
    inputs = {
        f"m{k}": torch.randn(samples, 5, generator=generator)
        + (3 - k) * F.one_hot(target, 5)  # the first is the easiest
        for k in range(modalities)
    }
    return inputs, target, torch.arange(samples)


def encoder_gradients(method: Method, steps: int = 1) -> list[Tensor]:
    """Of each encoder, flat, after steps that do not move the parameters."""
    torch.manual_seed(2)
    for _ in range(steps):
        method.network.zero_grad()
        method.backward(*batch(len(method.network.encoders)))
    return [methods.flat(methods.gradients(x)) for x in method.network.encoders.values()]


class TestOgmGe:
    @pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
    def test_stronger_modality_is_slowed_and_the_weaker_left_alone(self, alpha: float) -> None:
        stronger, weaker = methods.ogm_coefficients(torch.tensor([3.0, 1.5]), alpha).tolist()
        assert stronger == pytest.approx(1 - math.tanh(2 * alpha))
        assert 0 < stronger < 1
        assert weaker == 1

    def test_balanced_modalities_are_left_alone(self) -> None:
        assert methods.ogm_coefficients(torch.tensor([2.0, 2.0, 2.0]), 0.8).tolist() == [1, 1, 1]

    def test_gradients_of_the_stronger_encoder_shrink(self) -> None:
        trained = methods.OgmGe(problem(), 0.0)
        head = trained.network.fusion
        assert isinstance(head, Concatenation)
        inputs, target, _ = batch()
        with torch.no_grad():
            scores = torch.stack(
                [
                    methods.expected(x.softmax(dim=1), target).sum()
                    for x in head.parts(trained.network(inputs).features)
                ]
            )
        strong = int(scores.argmax())
        free = encoder_gradients(trained)
        slowed = encoder_gradients(methods.OgmGe(problem(), 0.8))
        assert slowed[strong].norm() < 0.9 * free[strong].norm()
        torch.testing.assert_close(slowed[1 - strong], free[1 - strong])

    def test_parts_sum_to_the_fused_logits(self) -> None:
        network = methods.Joint(problem(3), 0.0).network
        heads = network(batch(3)[0])
        assert isinstance(network.fusion, Concatenation)
        torch.testing.assert_close(sum(network.fusion.parts(heads.features)), heads.fused)

    def test_parts_of_a_deep_head_are_its_logits_where_the_others_are_absent(self) -> None:
        network = methods.Joint(problem(3, hidden=8), 0.0).network
        inputs = batch(3)[0]
        assert isinstance(network.fusion, Concatenation)
        parts = network.fusion.parts(network(inputs).features)
        for m, part in enumerate(parts):
            only = (torch.arange(3) == m).expand(32, 3)
            torch.testing.assert_close(part, network(inputs, only).fused)


class TestGradientBlending:
    def test_weights_are_gain_over_squared_overfitting(self) -> None:
        # gains 1 and 2; the gaps grow by 0.5 and 2
        train = torch.tensor([3.0, 4.0]), torch.tensor([1.5, 0.0])
        held_out = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 2.0])
        expected = torch.tensor([1 / 0.25, 2 / 4])
        torch.testing.assert_close(
            methods.blend_weights(train, held_out), expected / expected.sum()
        )

    def test_a_head_that_only_overfits_counts_nothing(self) -> None:
        train = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 0.5])
        held_out = torch.tensor([3.0, 3.0]), torch.tensor([2.0, 5.0])
        assert methods.blend_weights(train, held_out)[1] < 1e-5


class TestMMPareto:
    @pytest.mark.parametrize("seed", range(20))
    def test_the_direction_conflicts_with_neither_objective(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        joint, own = torch.randn(2, 3, generator=generator) * torch.tensor([[1.0], [seed + 1.0]])
        combined = methods.pareto_gradient(joint, own, 1.5)
        slack = 1e-4 * combined.norm() * joint.norm().maximum(own.norm())
        assert combined @ joint >= -slack
        assert combined @ own >= -slack
        total = joint + own
        if joint @ own >= 0:
            torch.testing.assert_close(combined, total)
        else:
            torch.testing.assert_close(combined.norm(), 1.5 * total.norm())

    def test_without_conflict_it_is_uniform(self) -> None:
        uniform = encoder_gradients(methods.Uniform(problem()))
        combined = encoder_gradients(methods.MMPareto(problem(), 1.0))
        alike = [torch.allclose(a, b, atol=1e-6) for a, b in zip(uniform, combined, strict=True)]
        joint = encoder_gradients(methods.Joint(problem(), 0.0))
        free = [j @ (u - j) >= 0 for j, u in zip(joint, uniform, strict=True)]
        assert alike == [bool(x) for x in free]


def test_uncertainty_is_least_where_the_weight_is_one_over_the_loss() -> None:
    losses = torch.tensor([0.2, 1.0, 3.0])
    log_variance = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_variance], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = methods.uncertainty_loss(losses, log_variance)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(torch.exp(-log_variance.detach()), 1 / losses, rtol=1e-3, atol=0)


def test_small_loss_keeps_the_share_with_the_smallest_losses() -> None:
    losses = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert sorted(methods.smallest(losses, 0.4).tolist()) == [1, 3, 4]
    assert len(methods.smallest(losses, 0.0)) == 5


class TestGeneralisedCrossEntropy:
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).double()
    target = torch.arange(16) % 4

    def test_near_zero_it_is_cross_entropy(self) -> None:
        torch.testing.assert_close(
            methods.generalised_cross_entropy(self.logits, self.target, 1e-6),
            F.cross_entropy(self.logits, self.target, reduction="none"),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_at_one_it_is_one_minus_the_probability(self) -> None:
        p = self.logits.softmax(dim=1)[torch.arange(16), self.target]
        torch.testing.assert_close(
            methods.generalised_cross_entropy(self.logits, self.target, 1.0), 1 - p
        )

    def test_probabilities_as_targets_agree_with_classes(self) -> None:
        soft = F.one_hot(self.target, 4).double()
        torch.testing.assert_close(
            methods.generalised_cross_entropy(self.logits, soft, 0.7),
            methods.generalised_cross_entropy(self.logits, self.target, 0.7),
        )


@pytest.mark.parametrize("modalities", [2, 6])
def test_modality_dropout_drops_one_modality_of_a_share(modalities: int) -> None:
    torch.manual_seed(0)
    missing = (~methods.drop_one(20_000, modalities, 0.3)).float()
    assert missing.sum(dim=1).max() == 1
    assert missing.sum(dim=1).mean() == pytest.approx(0.3, abs=0.015)
    assert missing.mean(dim=0).tolist() == pytest.approx([0.3 / modalities] * modalities, abs=0.01)


class TestLateAndSingle:
    def test_each_encoder_is_trained_alone(self) -> None:
        method = methods.Late(problem(), 0.0)
        inputs, target, index = batch()
        method.backward(inputs, target, index)
        before = [x.grad.clone() for x in method.network.encoders["m0"].parameters()]
        method.network.zero_grad()
        method.backward({**inputs, "m1": torch.zeros(32, 5)}, target, index)
        after = [x.grad for x in method.network.encoders["m0"].parameters()]
        torch.testing.assert_close(before, after)

    def test_late_is_the_mean_of_what_is_present(self) -> None:
        unimodal = {"a": torch.tensor([[2.0, 0.0]] * 2), "b": torch.tensor([[0.0, 4.0]] * 2)}
        present = torch.tensor([[True, True], [True, False]])
        fused = MeanOfLogits(("a", "b"), LINEAR)({}, unimodal, present)
        assert fused.tolist() == [[1, 2], [2, 0]]

    def test_sum_rule_is_the_mean_of_the_probabilities(self) -> None:
        unimodal = {"a": torch.tensor([[2.0, 0.0]] * 2), "b": torch.tensor([[0.0, 90.0]] * 2)}
        present = torch.tensor([[True, True], [True, False]])
        fused = MeanOfProbabilities(("a", "b"), LINEAR)({}, unimodal, present)
        a, b = (x[0].softmax(dim=0) for x in unimodal.values())
        torch.testing.assert_close(fused.softmax(dim=1), torch.stack([(a + b) / 2, a]))

    def test_a_modality_unlike_training_loses_its_say(self) -> None:
        fusion = FamiliarLogits(("a", "b"), LINEAR)
        unimodal = {"a": torch.tensor([[2.0, 0.0]] * 2048), "b": torch.tensor([[0.0, 4.0]] * 2048)}
        torch.manual_seed(0)
        features = {name: torch.randn(2048, WIDTH) for name in unimodal}
        fusion(features, unimodal, None)
        fusion.eval()
        mean = fusion(features, unimodal, None)
        torch.testing.assert_close(mean[:8], torch.tensor([[1.0, 2.0]] * 8), rtol=0.05, atol=0.05)
        far = fusion({**features, "b": 20 * features["b"]}, unimodal, None)
        torch.testing.assert_close(far, torch.tensor([[2.0, 0.0]] * 2048), rtol=0.01, atol=0.01)

    def test_generalised_cross_entropy_near_zero_is_late(self) -> None:
        late = encoder_gradients(methods.Late(problem(), 0.0))
        robust = encoder_gradients(methods.LateGce(problem(), 1e-6))
        torch.testing.assert_close(robust, late, rtol=1e-3, atol=1e-5)

    def test_single_predicts_by_the_modality_best_on_held_out_data(self) -> None:
        network = methods.Single(problem(3), 0.0).network
        assert isinstance(network.fusion, OneModality)
        assert network.fusion.position == 2  # as the rehearsal above has it
        heads = network(batch(3)[0])
        assert heads.fused is heads.unimodal["m2"]


class TestStoppedEarly:
    def test_what_is_held_out_trains_nothing(self) -> None:
        method = methods.StoppedEarly(problem(samples=32), 0.0)
        inputs, target, index = batch()
        method.backward(inputs, target, index)
        before = methods.flat(methods.gradients(method.network)).clone()
        held = method.held_out[index]
        assert int(held.sum()) == 3
        method.network.zero_grad()
        method.backward(inputs, torch.where(held, (target + 1) % 4, target), index)
        assert torch.equal(methods.flat(methods.gradients(method.network)), before)

    def test_it_ends_with_the_weights_that_predict_the_held_out_best(self) -> None:
        method = methods.StoppedEarly(problem(samples=32), 0.0)
        inputs, target, index = batch()
        target = torch.where(method.held_out[index], (target + 1) % 4, target)  # against the rest
        optimizer = torch.optim.Adam(method.network.parameters(), lr=1e-2)
        least, best, last = math.inf, torch.empty(0), torch.empty(0)
        for _ in range(60):
            optimizer.zero_grad()
            method.backward(inputs, target, index)
            last = self.parameters(method)
            if method.least < least:
                least, best = method.least, last
            optimizer.step()
        method.finish()
        assert torch.equal(self.parameters(method), best)
        assert not torch.equal(best, last)  # it has learnt what the held out contradict

    @staticmethod
    def parameters(method: Method) -> Tensor:
        return methods.flat([x.detach() for x in method.network.parameters()])


def test_aecf_trains_with_its_own_fusion() -> None:
    pytest.importorskip("aecf", reason="aecf is not installed (pip install --no-deps aecf)")
    method = METHODS["aecf"].build(problem(), 0.1)
    assert all(gradient.abs().sum() > 0 for gradient in encoder_gradients(method))


class TestDynCIM:
    @staticmethod
    def factors(method: Method, steps: int = 5) -> Tensor:
        """Factor of every head's loss, [M + 1, B], after some training."""
        inputs, target, index = batch(3)
        target[:8] = (target[:8] + 1) % 4
        optimizer = torch.optim.Adam(method.network.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            method.backward(inputs, target, index)
            optimizer.step()
        if steps:  # as if one modality had been left behind
            method.state.log_quality.copy_(torch.tensor([-0.1, -0.2, -0.3, -2.5]))
        heads = method.network.eval()(inputs)
        logits = [x.detach().requires_grad_() for x in heads.all()]
        unimodal = dict(zip(inputs, logits[1:], strict=True))
        method.loss(heads._replace(fused=logits[0], unimodal=unimodal), target, index).backward()
        found = []
        for x in logits:
            own = x.detach().softmax(dim=1) - F.one_hot(target, 4)
            found.append((x.grad * own).sum(dim=1) / own.square().sum(dim=1))
        return torch.stack(found)

    @staticmethod
    def ungated(make: type[methods.DynCIM]) -> methods.DynCIM:
        return make(problem(3), 0.0, gate=methods.no_gate)

    def test_equal_modalities_changes_only_the_modality_level(self) -> None:
        whole = self.factors(self.ungated(methods.DynCIM), steps=0)
        equal = self.factors(self.ungated(methods.EqualModalities), steps=0)
        torch.testing.assert_close(equal[0], whole[0])
        assert (whole[0] == 0).any()  # held out
        trained = self.factors(self.ungated(methods.DynCIM))
        ratio = trained[3] / trained[1]
        assert ratio[trained[0] > 0].sub(1).abs().min() > 0.1
        equal = self.factors(self.ungated(methods.EqualModalities))
        torch.testing.assert_close(equal[1:], equal[1:2].expand(3, -1), rtol=1e-2, atol=1e-5)

    def test_whole_losses_are_without_the_shares_of_skill(self) -> None:
        found = []
        for make in (methods.DynCIM, methods.WholeLosses):
            method = self.ungated(make)
            method.state.held_out_averages[0].fill_(1.0)
            method.state.held_out_averages[1].copy_(torch.tensor([0.9, 0.3, 0.7, 0.9]))
            found.append(self.factors(method, steps=0))
        shares = dyncim_core.loss_shares(method.state.skill)
        assert shares.min() < 0.2
        assert shares.max() > 0.8
        whole, without = found
        torch.testing.assert_close(without[0], whole[0])
        torch.testing.assert_close(without[1:] * shares.unsqueeze(1), whole[1:])

    def test_no_generalisation_leaves_out_what_does_not_hold(self) -> None:
        found = []
        for make in (methods.DynCIM, methods.NoGeneralisation):
            method = self.ungated(make)
            mass, nll = method.state.held_out_averages[0], method.state.held_out_averages[3]
            mass[:3] = 1.0
            nll[:3] = 9.0  # far worse than chance
            method.state.log_quality.fill_(-0.7)
            method.state.seen.fill_(1)
            found.append(self.factors(method, steps=0))
        whole, without = found
        torch.testing.assert_close(without[0], whole[0])
        ratio = whole[1:3, whole[0] > 0] / without[1:3, whole[0] > 0]
        assert (ratio < 0.2).all()
        assert (ratio > 0).all()

    def test_no_sample_level_weighs_all_samples_alike(self) -> None:
        whole = self.factors(methods.DynCIM(problem(3), 0.0))
        assert whole[0].max() > 1.05 * whole[0].min()
        without = self.factors(methods.DynCIM(problem(3), 0.0, **methods.NO_SAMPLE_LEVEL))[0]
        trained = without[without > 0]
        assert 24 < len(trained) < 32  # some are held out
        torch.testing.assert_close(trained, trained[:1].expand_as(trained), rtol=1e-2, atol=1e-5)

    @pytest.mark.parametrize("signal", [0, 1, 2])
    def test_one_signal_makes_the_difficulty(self, signal: int) -> None:
        method = methods.OneSignal(problem(), 0.0, signal=signal)
        seen = []
        method.objective.register_forward_pre_hook(lambda *_: seen.append(method.state.summary()))
        encoder_gradients(method, steps=3)
        assert len(seen) == 3
        for summary in seen:
            weights = [v for name, v in summary.items() if name.startswith("signal_weight/")]
            assert weights == [float(k == signal) for k in range(3)]

    @staticmethod
    def learnt(name: str, quality: Tensor | None = None) -> methods.DynCIM:
        """A variant of three modalities in the middle of training."""
        method = METHODS[name].build(problem(3), 0.0)
        assert isinstance(method, methods.DynCIM)
        method.state.log_quality.copy_(torch.tensor([-0.4, -0.7, -0.3, -1.9]))
        if quality is None:
            quality = torch.tensor([0.83, 0.7, 0.87, 0.17])
        method.state.quality.copy_(quality)
        method.state.skill.copy_(torch.tensor([0.8, 0.7, 0.6, 0.1]))
        method.state.class_seen[:2] = torch.tensor([3, 2])
        method.state.class_weight.fill_(1.0)
        return method

    @staticmethod
    def missing(method: methods.DynCIM, size: int = 40_000) -> list[float]:
        """Share of the samples that miss each modality, in training."""
        fusion = method.network.fusion.train()
        features = {f"m{k}": torch.ones(size, 64) for k in range(3)}
        torch.manual_seed(3)
        alike = dict.fromkeys(features, torch.zeros(size, 4))
        seen = []
        fusion.gates.register_forward_hook(lambda *call: seen.append(call[-1].gates))
        fusion(features, alike, None)
        absent = (seen[0] == 0).float()
        assert absent.sum(dim=1).max() <= 1
        return absent.mean(dim=0).tolist()

    @staticmethod
    def spread(share: float, state: dyncim_core.CurriculumState) -> list[float]:
        """What each modality misses where each is picked alike, the better less often."""
        share *= (25 / 26) ** 4  # of classes seen thrice and twice
        return (share / 3 * dyncim_core.augmentation_rates(state.skill[1:])).tolist()

    def test_the_whole_drops_by_redundancy(self) -> None:
        method = self.learnt("dyncim")
        share = 0.5 * float(redundancy_of(method.state))
        assert 0.05 < share < 0.45
        wanted = self.spread(share, method.state)
        assert self.missing(method) == pytest.approx(wanted, abs=0.004)

    def test_constant_dropout_does_not_follow_redundancy(self) -> None:
        method = self.learnt("dyncim/constant-dropout")
        assert self.missing(method) == pytest.approx(self.spread(0.25, method.state), abs=0.004)
        nothing = self.learnt("dyncim/constant-dropout")
        nothing.state.skill.zero_()
        nothing.state.class_seen.zero_()
        assert self.missing(nothing) == pytest.approx([0.25 / 3] * 3, abs=0.004)
        assert max(self.missing(self.learnt("dyncim", torch.zeros(4)))) == 0

    def test_shifted_hmir_is_the_harmonic_mean_of_the_ratios(self) -> None:
        method = self.learnt("dyncim/shifted-hmir")
        # Of skills 0.8 over 0.7, 0.6 and 0.1: less than the training qualities say.
        of_skill = 0.8 * ((0.7 + 0.6 + 0.1) / 3 / 0.8) ** 4
        assert methods.shifted_redundancy(method.state) == pytest.approx(of_skill, rel=1e-5)
        assert self.missing(method) == pytest.approx(
            self.spread(0.5 * of_skill, method.state), abs=0.004
        )
        # one modality is better than the fusion, so that the floor matters
        method.state.skill.zero_()
        ratios = [math.exp(-0.4 + x) for x in (0.7, 0.3, 1.9)]
        harmonic = 3 / sum(1 / r for r in ratios)
        shifted = 0.83 / harmonic**4
        assert methods.shifted_redundancy(method.state) == pytest.approx(shifted, rel=1e-5)
        assert abs(shifted - float(redundancy_of(method.state))) > 0.05

    @pytest.mark.parametrize("name", ["dyncim/no-modality-level", "dyncim/equal-losses"])
    def test_no_modality_level(self, name: str) -> None:
        method = self.learnt(name)
        assert isinstance(method, methods.EqualModalities)
        alike = pytest.approx([0.25 / 3] * 3, abs=0.004)
        assert (self.missing(method) == alike) == (name == "dyncim/no-modality-level")

    def test_dropout_in_front_of_the_gates_is_the_toolkits(self) -> None:
        state = self.learnt("dyncim").state

        def share(state: dyncim_core.CurriculumState) -> Tensor:
            return 0.5 * redundancy_of(state)

        inside = Gated(("m0", "m1", "m2"), LINEAR, state=state).train()
        outside = GatedUnderShare(("m0", "m1", "m2"), LINEAR, state=state, share=share).train()
        outside.load_state_dict(inside.state_dict())
        generator = torch.Generator().manual_seed(0)
        features = {f"m{k}": torch.randn(500, 64, generator=generator) for k in range(3)}
        unimodal = {f"m{k}": torch.randn(500, 4, generator=generator) for k in range(3)}
        fused = []
        for fusion in (inside, outside):
            torch.manual_seed(0)
            fused.append(fusion(features, unimodal, None))
        torch.testing.assert_close(fused[0], fused[1])
        torch.testing.assert_close(
            inside.eval()(features, unimodal, None), outside.eval()(features, unimodal, None)
        )
        assert not torch.allclose(fused[0], inside(features, unimodal, None))

    @pytest.mark.parametrize(
        ("name", "buffer", "kept", "value"),
        [
            ("dyncim/no-skill", "skill", "skill", 0.0),
            ("dyncim/whole-logits", "logit_weight", "logit_factor", 1.0),
        ],
    )
    def test_what_is_overruled_is_not_heard(
        self, name: str, buffer: str, kept: str, value: float
    ) -> None:
        inputs, _, _ = batch()
        for method, expected in ((name, value), ("dyncim", 0.5)):
            learnt = METHODS[method].build(problem(), 0.0)
            assert learnt.state is not None
            learnt.state.get_buffer(buffer)[1:] = 0.5
            learnt.network.train()(inputs)
            assert (learnt.network.fusion.gates.get_buffer(kept) == expected).all()

    def test_no_gate_is_plain_concatenation(self) -> None:
        assert isinstance(self.learnt("dyncim/no-gate").network.fusion, Concatenation)

    def test_other_logits_change_nothing_else(self) -> None:
        features = {f"m{k}": torch.randn(5, 64) for k in range(3)}
        unimodal = {f"m{k}": torch.randn(5, 4, requires_grad=True) for k in range(3)}
        whole, attached, without = (
            self.learnt(name).network.eval().fusion
            for name in ("dyncim", "dyncim/attached-logits", "dyncim/no-logits")
        )
        attached.load_state_dict(whole.state_dict())
        without.load_state_dict(whole.state_dict())
        fused = whole(features, unimodal, None)
        gated = whole.gates(features, unimodal=unimodal).logits
        assert gated.abs().max() > 0
        torch.testing.assert_close(without(features, unimodal, None) + gated, fused)
        for fusion in (whole, without):
            fusion(features, unimodal, None).sum().backward()
        assert all(x.grad is None for x in unimodal.values())
        torch.testing.assert_close(attached(features, unimodal, None), fused)
        gates = attached.train().gates
        gates.dropout = 0.0
        gates._state[0].logit_weight.copy_(torch.tensor([1.0, 0.25, 0.5, 0.75]))
        attached(features, unimodal, None).sum().backward()
        part = 1.0 - gates._state[0].quality[0]  # as much as their values count in training
        scale = gates(features, unimodal=unimodal).gates
        scale = part * scale / scale.amax(dim=1, keepdim=True)
        for m, x in enumerate(unimodal.values()):
            torch.testing.assert_close(x.grad, scale[:, m : m + 1].expand(5, 4))

    def test_logits_in_training_are_withdrawn_but_for_an_ablation(self) -> None:
        features = {f"m{k}": torch.randn(5, 64) for k in range(3)}
        unimodal = {f"m{k}": torch.randn(5, 4, requires_grad=True) for k in range(3)}
        found = {}
        for name in ("", "/attached-logits", "/logits-throughout", "/no-logits"):
            method = self.learnt(f"dyncim{name}")
            assert 0 < method.state.quality[0] < 1
            fusion = method.network.train().fusion
            fusion.load_state_dict(self.learnt("dyncim").network.fusion.state_dict())
            fusion.gates.dropout = 0.0
            found[name] = fusion(features, unimodal, None)
        whole, attached, throughout = (found[x] - found["/no-logits"] for x in list(found)[:3])
        assert whole.abs().max() > 0.01
        torch.testing.assert_close(attached, whole)
        torch.testing.assert_close(throughout * (1.0 - method.state.quality[0]), whole)
        grads = torch.autograd.grad(
            found["/logits-throughout"].sum(), unimodal["m0"], allow_unused=True
        )
        assert grads == (None,)

    def test_full_dropout_is_the_toolkits(self) -> None:
        assert dyncim_core.GatedFusion([1, 1]).dropout == methods.DROPOUT

    @pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("dyncim")])
    def test_the_setting_is_weight_decay(self, name: str) -> None:
        method = METHODS[name].build(problem(), 0.25)
        (group,) = torch.optim.Adam(method.parameters()).param_groups
        assert group["weight_decay"] == 0.25
        assert len(group["params"]) == len(list(method.network.parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_classes_and_on_probabilities(name: str, tmp_path: Path) -> None:
    entry = METHODS[name]
    if entry.missing():
        pytest.skip(entry.missing())
    inputs, target, index = batch()
    for wanted in (target, F.one_hot(target, 4) * 0.8 + 0.05):
        method = entry.build(problem(), suites.chosen(tmp_path / "none")[name])
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            method.backward(inputs, wanted, index)
            optimizer.step()
        predicted = method.network.eval()(inputs).fused.argmax(dim=1)
        assert (predicted == target).float().mean() > 0.8


class TestSpecialists:
    def method(self, modalities: int = 3) -> methods.UniformSpecialists:
        return methods.UniformSpecialists(problem(modalities))

    def test_each_is_asked_for_what_it_was_trained_for(self) -> None:
        network = self.method().network.eval()
        for k, lacking in enumerate(network.lacking):
            torch.nn.init.constant_(lacking.fusion.head.bias, float(k + 1))
        inputs, _, _ = batch(3)
        present = torch.ones(32, 3, dtype=torch.bool)
        present[torch.arange(30), torch.arange(30) % 3] = False
        found = network(inputs, present)
        whole = network(inputs)
        torch.testing.assert_close(found.fused[30:], whole.fused[30:])
        assert torch.equal(whole.fused, network.whole(inputs).fused)
        for k, (lacking, mask) in enumerate(network.each(32)):
            assert mask[0].tolist() == [m != k for m in range(3)]
            rows = torch.arange(k, 30, 3)
            torch.testing.assert_close(found.fused[rows], lacking(inputs, mask).fused[rows])

    def test_what_is_absent_leaves_no_trace(self) -> None:
        method = self.method()
        inputs, target, index = batch(3)
        method.backward(inputs, target, index)
        head = method.network.lacking[1].fusion.head.weight.grad.split(64, dim=1)
        assert [bool(x.any()) for x in head] == [True, False, True]
        alone = methods.Uniform(problem(3))
        alone.backward(inputs, target, index)
        for x, y in zip(alone.network.parameters(), method.network.whole.parameters(), strict=True):
            torch.testing.assert_close(x.grad, y.grad)

    def test_the_report_says_how_far_it_is(self) -> None:
        scores = {"dyncim": 81.0, "uniform": 80.0, methods.CEILING: 81.5}
        cell = Cell("uci:a+b+c", "absent-100", True, {k: {0: v} for k, v in scores.items()})
        found = next(b for b in bars.bars({}, [cell]) if b.name.startswith("swap and absent"))
        assert "+1.0" in found.cases
        assert "(uniform; 1.5 to networks trained for what is present)" in found.cases


class TestConditions:
    def test_clean_is_the_data(self) -> None:
        split = prepare(DATA, "clean", seed=3)
        assert (split.target == split.truth).all()
        for x in split.train.values():
            assert x.mean(dim=0).abs().max() < 1e-4
        assert len(split.truth) == len(split.test_truth) == 1000

    @pytest.mark.parametrize(("name", "share"), [("symmetric-20", 0.2), ("symmetric-40", 0.4)])
    def test_symmetric_noise(self, name: str, share: float) -> None:
        split = prepare(DATA, name, seed=3)
        wrong = (split.target != split.truth).float().mean()
        assert wrong == pytest.approx(0.9 * share, abs=0.03)  # by chance a tenth is right

    def test_asymmetric_noise(self) -> None:
        split = prepare(DATA, "asymmetric-30", seed=3)
        wrong = split.target != split.truth
        assert int(wrong.sum()) == 300
        assert (split.target[wrong] == (split.truth[wrong] + 1) % 10).all()

    def test_corrupted_inputs(self) -> None:
        clean, split = prepare(DATA, "clean", seed=3), prepare(DATA, "corrupted-30", seed=3)
        changed = [
            int((clean.train[name] != x).any(dim=1).sum()) for name, x in split.train.items()
        ]
        assert sorted(changed) == [0, 0, 300]
        assert (split.target == clean.target).all()

    def test_small_and_imbalanced(self) -> None:
        assert len(prepare(DATA, "small-100", seed=3).target) == 100
        sizes = prepare(DATA, "imbalanced-20", seed=3).truth.bincount()
        assert sizes[0] / sizes[9] == pytest.approx(20, rel=0.2)
        assert (sizes.diff() <= 0).all()

    def test_a_regression_has_no_classes(self) -> None:
        with pytest.raises(ValueError, match="expected a task with classes"):
            prepare("diabetes", "asymmetric-30", seed=0)

    @pytest.mark.parametrize(("name", "share"), [("noise-2", 1), ("swap-50", 0.5), ("swap-100", 1)])
    def test_one_modality_of_a_share_of_the_test_samples(self, name: str, share: float) -> None:
        test = prepare(DATA, "clean", seed=3).test
        inputs, present = corrupt_test(name, test, seed=3)
        assert present is None
        hits = torch.stack([(inputs[k] != test[k]).any(dim=1) for k in test]).sum(dim=0)
        assert hits.max() == 1
        assert hits.float().mean() == pytest.approx(share, abs=0.05)

    def test_absent(self) -> None:
        test = prepare(DATA, "clean", seed=3).test
        for name, share in (("absent-50", 0.5), ("absent-100", 1)):
            present = corrupt_test(name, test, seed=3)[1]
            assert present is not None
            missing = (~present).sum(dim=1)
            assert missing.max() == 1
            assert missing.float().mean() == pytest.approx(share, abs=0.05)


class TestData:
    def test_seeds_split_differently_and_reproducibly(self) -> None:
        first, again, other = (load(DATA, seed).truth for seed in (1, 1, 2))
        assert (first == again).all()
        assert not (first == other).all()

    def test_odd_asks_the_same_samples_for_less(self) -> None:
        digits, odd = load("uci:fou+mor", 3), load("odd:fou+mor", 3)
        assert (odd.train["fou"] == digits.train["fou"]).all()
        assert (odd.truth == digits.truth % 2).all()
        assert (odd.target == odd.truth).all()
        assert (odd.test_truth == digits.test_truth % 2).all()
        assert odd.num_classes == 2

    def test_the_histogram_keeps_the_value(self) -> None:
        split = load("diabetes", 0)
        assert split.centres is not None
        torch.testing.assert_close(split.truth.sum(dim=1), torch.ones(300))
        spread = (split.truth @ split.centres).std()
        assert spread == pytest.approx(float(split.test_truth.std()), rel=0.2)
        exact = F.one_hot(((split.test_truth - 9) / 18).round().long(), 20).float()
        assert -9 <= split.score(exact) < 0

    @pytest.mark.skipif(not SPOKEN.exists(), reason=f"there is no {SPOKEN}")
    def test_digits_are_paired_by_class_with_unseen_speakers(self) -> None:
        split = load("digits", 0)
        assert {name: tuple(x.shape[1:]) for name, x in split.train.items()} == {
            "audio": (40, 32),
            "image": (64,),
        }
        # images of one class are alike: the pairing is by class
        image = torch.cat([split.train["image"]])
        means = torch.stack([image[split.truth == c].mean(dim=0) for c in range(10)])
        hits = torch.cdist(split.test["image"], means).argmin(dim=1) == split.test_truth
        assert hits.float().mean() > 0.45

    def test_the_easy_modality_starves_the_better_one(self) -> None:
        config = Config("starving", "clean", "joint", 0.0, seed=300, epochs=40)
        joint, alone = run(config), run(replace(config, method="late"))

        def hard(measures: dict[str, float | str]) -> float:
            return float(str(measures["probes"]).split("hard=")[1])

        assert hard(alone) > hard(joint) + 10  # starved
        assert hard(alone) > float(joint["score"])  # and it would have been better alone

    def test_classes_overlap_in_every_modality_and_in_all(self) -> None:
        split = prepare("overlap", "clean", 0)

        def told(train: Tensor, test: Tensor) -> float:
            return split.score(probe(train, split.truth, test, split.num_classes))

        each = [told(split.train[name], split.test[name]) for name in split.modalities]
        whole = [torch.cat(list(x.values()), dim=1) for x in (split.train, split.test)]
        assert all(30 < score < 56 for score in each)
        assert max(each) + 5 < told(*whole) < 70

    def test_modalities_tell_together_what_neither_does_alone(self) -> None:
        config = Config("together", "clean", "joint", 0.0, seed=300, epochs=20)
        joint, alone = run(config), run(replace(config, method="late"))
        assert float(alone["score"]) < 50  # of the two bits, no modality shows the second
        assert float(joint["score"]) > float(alone["score"]) + 20

    @pytest.mark.parametrize(("data", "silent"), [("question", 1), ("reference", 1), ("common", 2)])
    def test_what_tells_nothing_by_itself_is_heard(self, data: str, silent: int) -> None:
        config = Config(data, "clean", "dyncim", 0.001, seed=300, epochs=20)
        found, alone = run(config), run(replace(config, method="late"))
        split = load(data, seed=300)
        guess = 100 * float(split.test_truth.bincount().max()) / len(split.test_truth)
        probes = [float(x.partition("=")[2]) for x in str(alone["probes"]).split()]
        assert probes[silent] < guess + 3
        assert float(found["score"]) > float(alone["score"]) + 8


class TestDrawn:
    def test_each_seed_is_a_task_of_its_own(self) -> None:
        tasks = [load("drawn", seed) for seed in range(40)]
        assert {len(split.modalities) for split in tasks} == {2, 3, 4, 5}
        assert {split.num_classes for split in tasks} >= {2, 3, 4, 5, 10, 20, 50}
        assert {len(split.truth) for split in tasks} == {300, 1000, 2000}
        assert {split.hidden for split in tasks} == {0, 128}
        for split in tasks:
            assert len(split.test_truth) == 2000
            assert int(split.test_truth.max()) < split.num_classes
        again = load("drawn", 7)
        assert torch.equal(again.truth, tasks[7].truth)
        for name, x in again.train.items():
            assert torch.equal(x, tasks[7].train[name])

    def test_some_tell_a_class_only_together(self) -> None:
        """Of the first two modalities, the nearest centre then tells no more than guessing."""
        rates = []
        for seed in range(40):
            split = load("drawn", seed)
            if split.num_classes > 4:
                continue
            best = 0.0
            for name in split.modalities:
                classes = range(split.num_classes)
                means = [split.train[name][split.truth == c].mean(dim=0) for c in classes]
                near = torch.cdist(split.test[name], torch.stack(means)).argmin(dim=1)
                best = max(best, float((near == split.test_truth).double().mean()))
            rates.append(best * split.num_classes)
        assert min(rates) < 1.2
        assert max(rates) > 1.5


class TestMeasures:
    def test_calibration_error_by_hand(self) -> None:
        # confidence 0.8 right half of the time: 30 points; confidence 0.6 always right: 40
        p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]])
        assert calibration_error(p, torch.tensor([0, 1, 0, 0])) == pytest.approx(35, abs=1e-4)

    def test_probe_reads_what_is_linear(self) -> None:
        x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long()
        found = probe(x[:200], y[:200], x[200:], 2).argmax(dim=1)
        assert (found == y[200:]).float().mean() > 0.93
        parity = (x[:, 0] * x[:, 1] > 0).long()
        found = probe(x[:200], parity[:200], x[200:], 2).argmax(dim=1)
        assert (found == parity[200:]).float().mean() < 0.7

    def test_auroc_counts_pairs(self) -> None:
        score = np.array([0.1, 0.4, 0.4, 0.9, 0.3])
        wrong = np.array([False, True, False, True, False])
        pairs = [float(a > b) + 0.5 * float(a == b) for a in score[wrong] for b in score[~wrong]]
        assert auroc(score, wrong) == pytest.approx(np.mean(pairs))

    def test_doubt_finds_wrong_labels(self) -> None:
        split = prepare(FAST, "symmetric-20", seed=0)
        score, _ = doubt(list(split.train.values()), split.target)
        assert auroc(score, (split.target != split.truth).numpy()) > 0.8

    def test_self_confidence_is_cleanlabs(self) -> None:
        rank = pytest.importorskip("cleanlab.rank", reason="cleanlab is not installed")
        p = np.random.default_rng(0).dirichlet(np.ones(4), size=50)
        y = np.arange(50) % 4
        theirs = rank.get_label_quality_scores(y, p, method="self_confidence")
        np.testing.assert_allclose(self_confidence(p, y), theirs)

    def test_epochs_to(self) -> None:
        assert epochs_to(np.array([10.0, 50.0, 40.0, 60.0]), 45.0) == 2
        assert epochs_to(np.array([10.0, 20.0]), 45.0) == float("inf")


class TestStatistics:
    def test_interval_is_students(self) -> None:
        found = statistics.estimate({0: 1.0, 1: 2.0, 2: 3.0})
        assert found.mean == 2
        assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)

    def test_difference_is_paired(self) -> None:
        found = statistics.difference({0: 1.0, 1: 12.0, 2: 5.0}, {0: 0.0, 1: 11.0})
        assert (found.mean, found.half, found.seeds) == (1, 0, 2)

    def test_ranks_average_ties(self) -> None:
        scores = {"a": {0: 3.0}, "b": {0: 5.0}, "c": {0: 3.0}}
        assert statistics.ranks(scores) == {"a": 2.5, "b": 1, "c": 2.5}


class TestBars:
    @staticmethod
    def cell(ours: float, condition: str = "clean", tested: bool = False) -> Cell:
        shape = np.array([-0.1, 0.0, 0.1])
        return Cell(
            DATA,
            condition,
            tested,
            {
                "dyncim": dict(enumerate(ours + shape)),
                "uniform": dict(enumerate(90 + 2 * shape)),
                "dyncim/no-gate": dict(enumerate(99 + shape)),
            },
        )

    @pytest.mark.parametrize(
        ("condition", "tested", "enough", "short"),
        [
            ("clean", False, 89.9, 89.0),
            ("symmetric-40", False, 95.1, 94.9),
            ("swap-100", True, 93.1, 92.9),
        ],
    )
    def test_verdicts_follow_the_runs(
        self, condition: str, tested: bool, enough: float, short: float
    ) -> None:
        for ours, verdict in ((enough, True), (short, False)):
            found = bars.bars({}, [self.cell(ours, condition, tested)])
            told = [bar.met for bar in found[1:] if bar.met is not None]
            assert told == [verdict]

    def test_the_best_other_is_no_ablation(self) -> None:
        found = bars.lead(self.cell(91.0))
        assert found is not None
        assert found[0] == "uniform"

    def test_label_noise_says_how_much_there_is_to_gain(self) -> None:
        noisy = self.cell(88.0, "symmetric-40")
        noisy.scores["uniform"] = dict.fromkeys(range(3), 86.5)
        met = [bar for bar in bars.bars({}, [self.cell(91.0), noisy]) if "label noise" in bar.name]
        assert [bar.cases for bar in met] == [
            f"**{DATA} symmetric-40 +1.5 ± 0.2 (uniform; 4.5 to the best clean score)**"
        ]
        (alone,) = [bar for bar in bars.bars({}, [noisy]) if "label noise" in bar.name]
        assert "(uniform)" in alone.cases

    @staticmethod
    def ablated(level: list[float], gate: list[float]) -> bars.Bar:
        """The bar, of cells where the variants differ from the whole by these."""
        shape = np.array([-0.1, 0.0, 0.1])
        found = [
            Cell(
                data,
                "clean",
                False,
                {
                    "dyncim": dict.fromkeys(range(3), 80.0),
                    "dyncim/no-modality-level": dict(enumerate(80 + a + shape)),
                    "dyncim/no-gate": dict(enumerate(80 + b + shape)),
                },
            )
            for data, a, b in zip(("x", "y", "diabetes"), level, gate, strict=True)
        ]
        return bars.bars({}, found)[-1]

    def test_each_part_earns_its_place_by_its_mean_and_intervals(self) -> None:
        bar = self.ablated([-2.0, 0.1, 90.0], [-0.2, -1.0, 90.0])  # diabetes is no accuracy
        assert bar.met is True
        assert bar.cases == (
            "no-modality-level -0.95 over 2 conditions, interval below 0 in 1, above in 0; "
            "no-gate -0.60 over 2 conditions, interval below 0 in 1, above in 0"
        )
        bar = self.ablated([-2.0, 1.0, 0.0], [-0.2, -1.0, 0.0])  # one up, one down: by chance
        assert bar.met is False
        assert bar.cases.startswith("**no-modality-level -0.50")
        bar = self.ablated([-2.0, 0.1, 0.0], [0.2, 0.2, -90.0])
        assert bar.met is False
        assert bar.cases.startswith("**no-gate +0.20")
        assert bars.bars({}, [])[-1].met is None

    def test_what_lacks_a_method_is_not_compared(self) -> None:
        few, all_ = self.cell(89.0), self.cell(91.0)
        all_.scores["late"] = dict.fromkeys(range(3), 95.0)
        assert bars.compared([few, all_]) == [all_]
        assert bars.compared([few]) == [few]
        alone = bars.bars({}, [all_])
        together = bars.bars({}, [few, all_])
        assert together[0].cases == alone[0].cases == "late is first over 1 conditions"
        assert together[1].cases == alone[1].cases

    def test_mean_rank(self) -> None:
        order, count = bars.mean_ranks([self.cell(91.0), self.cell(92.0), self.cell(80.0)])
        assert count == 3
        assert order == pytest.approx({"dyncim": 4 / 3, "uniform": 5 / 3})


class TestSuites:
    def test_headline_shares_nothing_with_tuning(self, tmp_path: Path) -> None:
        tuning = suites.configs("tuning", tmp_path / "none")
        for suite in ("headline", "breadth", "digits"):
            confirmed = suites.configs(suite, tmp_path / "none")
            assert not {c.data for c in tuning} & {c.data for c in confirmed}
            assert not {c.seed for c in tuning} & {c.seed for c in confirmed}

    def test_every_method_with_a_setting_gets_the_same_budget(self, tmp_path: Path) -> None:
        tuning = suites.configs("tuning", tmp_path / "none")
        counts = {name: sum(c.method == name for c in tuning) for name in methods.peers()}
        assert len({counts[name] for name, entry in METHODS.items() if entry.grid}) == 1

    def test_dyncim_is_tuned_over_its_grid_and_ablations_are_not(self, tmp_path: Path) -> None:
        tuning = suites.configs("tuning", tmp_path / "none")
        assert {c.setting for c in tuning if c.method == "dyncim"} == {0.0, 1e-4, 1e-3}
        assert not [c for c in tuning if "/" in c.method]

    def test_ablations_have_the_setting_of_the_whole(self, tmp_path: Path) -> None:
        settings = tmp_path / suites.SETTINGS
        settings.write_text("method,value,chosen\ndyncim,0.0,no\ndyncim,0.001,yes\n")
        found = [c for c in suites.configs("ablation", settings) if c.method != "uniform"]
        assert {c.method for c in found} == {name for name in METHODS if "dyncim" in name}
        assert {c.setting for c in found} == {0.001}

    def test_keys_tell_runs_apart(self, tmp_path: Path) -> None:
        every = {c for suite in suites.SUITES for c in suites.configs(suite, tmp_path / "none")}
        assert len({c.key for c in every}) == len(every)
        assert all(c.condition in CONDITIONS and family(c.data) for c in every)


class TestStore:
    config = Config(FAST, "clean", "uniform", 1.0, 0, 1)

    def test_what_is_stored_comes_back(self, tmp_path: Path) -> None:
        Store(tmp_path).add("smoke", self.config, {"score": 91.25, "curve": "90.0 91.2"})
        row = Store(tmp_path).rows[self.config.key]
        assert (row["score"], row["curve"], row["data"]) == ("91.25", "90.0 91.2", FAST)

    def test_rows_of_before_a_measure_was_added_lack_it(self, tmp_path: Path) -> None:
        Store(tmp_path).add("smoke", self.config, {"score": 91.25})
        file = tmp_path / "smoke.csv"
        header, row = (line.split(",") for line in file.read_text().splitlines())
        at = header.index("ece_scaled")
        file.write_text("".join(",".join(x[:at] + x[at + 1 :]) + "\n" for x in (header, row)))
        (found,) = Store(tmp_path).rows.values()
        assert (found["score"], found["ece_scaled"]) == ("91.25", "")

    def test_an_interrupted_write_leaves_the_file_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = Store(tmp_path)
        store.add("smoke", self.config, {"score": 91.25})
        before = (tmp_path / "smoke.csv").read_bytes()
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.add("smoke", replace(self.config, seed=1), {"score": 1.0})
        assert (tmp_path / "smoke.csv").read_bytes() == before
        assert list(Store(tmp_path).rows) == [self.config.key]


class TestCommands:
    arguments = ("run", "--suite", "smoke", "--data", "diabetes", "--methods", "uniform", "dyncim")

    def test_run_resume_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = ("--out", str(tmp_path))
        assert main([*self.arguments, *out, "--dry-run"]) == 0
        assert "0 runs finished, 4 to do" in capsys.readouterr().out
        assert main([*self.arguments, *out, "--seeds", "0:1"]) == 0
        first = (tmp_path / "smoke.csv").read_text()
        capsys.readouterr()
        assert main([*self.arguments, *out]) == 0
        assert "2 runs finished, 2 to do" in capsys.readouterr().out
        assert (tmp_path / "smoke.csv").read_text().startswith(first)

        assert main(["report", "--suite", "smoke", "--name", "smoke", *out]) == 0
        text = (tmp_path / "smoke.md").read_text()
        assert "4 of 36 runs" in text
        assert "## Scores: diabetes" in text
        assert (tmp_path / "smoke-leads.png").stat().st_size > 5000

    def test_two_processes_give_what_one_gives(self, tmp_path: Path) -> None:
        scores = []
        for jobs in ("1", "2"):
            out = tmp_path / jobs
            assert main([*self.arguments, "--jobs", jobs, "--out", str(out)]) == 0
            scores.append({key: row["score"] for key, row in Store(out).rows.items()})
        assert scores[0] == scores[1]

    def test_absent_data_is_skipped_with_the_reason(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        nothing = str(tmp_path / "nothing.npz")
        found = main(
            ["run", "--suite", "digits", "--spoken-digits", nothing, "--out", str(tmp_path)]
        )
        assert found == 0
        text = capsys.readouterr().out
        assert f"digits needs --spoken-digits, there is no {nothing}" in text
        assert "0 to do" in text

    def test_choose_takes_the_best_of_every_grid(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        for config in suites.configs("tuning", tmp_path / "none"):
            if config.method in ("gce", "dyncim"):
                score = 90.0 - abs(config.setting - {"gce": 0.9, "dyncim": 1e-3}[config.method])
                store.add("tuning", config, dict.fromkeys(("score", *TEST_CONDITIONS), score))
        assert main(["choose", "--out", str(tmp_path)]) == 0
        chosen = suites.chosen(tmp_path / suites.SETTINGS)
        assert chosen["gce"] == 0.9
        assert chosen["uniform"] == 1.0  # not tuned here: the middle of its grid
        assert chosen["dyncim"] == chosen["dyncim/no-gate"] == 1e-3
        assert {row["method"] for row in self.settings(tmp_path)} == {"gce", "dyncim"}
        assert len(self.settings(tmp_path)) == 6

    @staticmethod
    def settings(folder: Path) -> list[dict[str, str]]:
        with (folder / suites.SETTINGS).open(newline="") as file:
            return list(csv.DictReader(file))

    def test_a_missing_package_names_the_extra(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        assert main([*self.arguments, "--out", str(tmp_path)]) == 1
        assert 'tqdm halted; None in sys.modules; pip install -e ".[study]"' in (
            capsys.readouterr().err
        )

    def test_choose_without_runs_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["choose", "--out", str(tmp_path)]) == 1
        assert "expected the finished runs of suite tuning" in capsys.readouterr().err


def test_tables_are_markdown() -> None:
    assert report.table(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert report.table(("a",), []) == ""
    assert report.number(statistics.Estimate(1.25, 0.5, 3), sign=True) == "+1.2 ± 0.5"


def test_calibration_is_told_with_and_without_the_temperature(tmp_path: Path) -> None:
    store = Store(tmp_path)
    configs = [Config(FAST, "clean", name, 0.0, 0, 1) for name in ("uniform", "dyncim")]
    for config, measures in zip(
        configs, ({"ece": 8.0}, {"ece": 12.0, "ece_scaled": 5.0}), strict=True
    ):
        store.add("smoke", config, {"score": 90.0, **measures})
    text = report._calibration(gather(configs, store.rows))
    assert text.splitlines() == [
        "| ECE, % | uniform | dyncim | dyncim, over its temperature |",
        "|---|---|---|---|",
        f"| {FAST}, clean | 8.0 | 12.0 | 5.0 |",
    ]


def test_every_task_of_a_suite_is_known_throughout() -> None:
    tasks = {
        family(data) for blocks in suites.SUITES.values() for block in blocks for data in block.data
    }
    for known in (EPOCH, EPOCHS, MARKS, SECONDS):
        assert tasks <= set(known)
