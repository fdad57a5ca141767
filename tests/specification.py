"""A step of the curriculum in NumPy, composed of ``dyncim_core.reference``, and runs to try it on.

``run`` has a backend take the same steps as ``Specification``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyncim_core import CurriculumState
from dyncim_core import reference as ref
from dyncim_core.kernels.interface import Criterion, Settings

SAMPLES, CLASSES, MODALITIES = 60, 5, 2
Array = NDArray[Any]


class Specification(SimpleNamespace):
    """What a ``CurriculumState`` holds, by the names of its buffers."""

    def __init__(self, decay: float, memory_decay: float, classes: int) -> None:
        heads = 1 + MODALITIES
        super().__init__(
            log_quality=np.zeros(heads),
            quality=np.zeros(heads),
            seen=np.zeros(heads),
            signal_mean=np.zeros(3),
            volatility=np.zeros(3),
            label_noise=0.0,
            doubted=0.0,
            skill=np.zeros(heads),
            held_out_averages=np.zeros((7, heads)),
            logit_weight=np.ones(heads),
            log_class_average=np.zeros(1024),
            class_seen=np.zeros(1024),
            class_weight=np.zeros(1024),
            effective_share=1.0,
            step=0,
            nonfinite=0,
            memory_nll=np.zeros((SAMPLES, heads)),
            memory_visits=np.zeros((SAMPLES, heads)),
            memory_weight=np.ones(SAMPLES),
        )
        self._decay, self._classes = decay, classes
        self._rate, self._memory_rate = 1.0 - decay, 1.0 - memory_decay

    def __call__(
        self,
        logits: list[Array],
        present: Array | None,
        target: Array,
        weight: Array | None,
        options: dict[str, Any],
        index: Array | None,
        settings: Settings,
    ) -> tuple[Array, Array]:
        """Value and coefficient of a batch."""
        with np.errstate(invalid="ignore"):
            found = ref.head_statistics(logits, target, present=present, weight=weight, **options)
        mask = np.ones(found.nll.shape, dtype=bool) if present is None else present
        soft = target.ndim == 2
        classes = target.argmax(axis=1) if soft else target
        counts = np.ones(len(target), dtype=bool) if soft else target != options["ignore_index"]
        finite = np.isfinite(found.nll + found.entropy).all(axis=0)
        held = np.zeros_like(counts)
        if index is not None and settings.held_out > 0.0:
            held = ref.held_out(index, settings.held_out)
        valid, heard = counts & finite & ~held, counts & finite & held
        said = found.nll
        self._share = 1.0
        if soft:  # what goes beyond the target's own entropy, of what there is to learn
            own = ref.target_entropy(target)
            some = valid if valid.any() else finite
            self._share = ref.share_to_learn(own[some].mean(), self._classes)
            beyond = np.maximum(found.nll - own, 0.0)
            found = found._replace(nll=beyond, entropy=found.entropy - own)
        losses = found.nll / self._share
        lost = self._lost(found, losses, said, logits, mask, heard, settings)
        weights, signals = self._weigh(found, mask, valid, classes % 1024, settings)
        said = [np.where(finite, x, 0.0) for x in (found.nll, found.entropy)]
        asked = mask & ref.witnesses(self.skill)[:, None]
        labels = target if soft else np.where(counts, target, 0)
        alone = ref.doubt(found.prediction, *said, labels)
        sure = ref.sureness(said[1], self._classes)
        doubted = ref.contradiction(found.prediction, alone, sure, asked)
        if valid.any() and index is not None and settings.held_out > 0.0:
            rate = self._rate if self.seen[0] else 1.0
            self.doubted += rate * (alone[0, valid].mean() - self.doubted)
        self._take_in(losses, mask & valid, weights, signals)
        if heard.any():
            samples = settings.held_out * SAMPLES
            said = [found.prediction == classes, *lost, np.broadcast_to(doubted, mask.shape), alone]
            self._listen(mask & heard, found.prediction, said, samples)
        elif valid.any() and settings.held_out == 0.0 and self.held_out_averages[0, 0] == 0.0:
            self.label_noise += self._rate * (doubted[valid].mean() - self.label_noise)
        np.add.at(self.class_seen, classes[valid] % 1024, 1)
        known = options["label_smoothing"] == 0.0 and self._classes <= 1024 and not soft
        self.class_weight[:] = known
        if known and weight is not None:
            self.class_weight[: len(weight)] = weight
        self.step += 1
        self.nonfinite += (counts & ~finite).sum()
        if index is not None:
            self._remember(index, losses, mask & (valid | heard), weights)

        kept = counts & ~held & (valid | (not settings.skip_nonfinite))
        ahead = ref.modality_coefficients(self.log_quality) * ref.loss_shares(self.skill)
        mass, nll = self.held_out_averages[[0, 3]]
        for m in np.flatnonzero(mass[1:]):
            shown = ref.quality(-nll[1 + m] / mass[1 + m], self._classes)
            ahead[m] *= ref.generalisation(shown, self.quality[1 + m])
        factor = np.append(1.0, ahead)
        factor[1:] *= settings.unimodal_strength
        trained = ~held & (valid | (not settings.skip_nonfinite))
        coefficient = factor[:, None] * np.where(trained, weights, 0.0) * mask
        if settings.reduction == "mean":
            masses = np.ones(len(target))
            if weight is not None and not soft:
                masses = weight[np.where(kept, target, 0)]
            coefficient /= masses[kept].sum() or (counts & ~kept).sum()
        left_out = (coefficient == 0.0) & (settings.skip_nonfinite or settings.held_out > 0.0)
        with np.errstate(invalid="ignore"):
            terms = np.where(left_out, 0.0, coefficient * found.loss).sum(axis=0)
        return terms if settings.reduction == "none" else terms.sum(), coefficient

    def _weigh(
        self,
        found: ref.HeadStatistics,
        mask: Array,
        valid: Array,
        group: Array,
        settings: Settings,
    ) -> tuple[Array, Array]:
        nll, entropy, distance = (x[:, valid] for x in (found.nll, found.entropy, found.distance))
        present = mask[:, valid]
        signals = np.stack(
            [
                ref.prediction_deviation(nll, present),
                ref.prediction_consistency(distance, present),
                ref.prediction_stability(entropy, self._classes),
            ]
        )
        strength, surprise = self._surprise(nll, entropy, present, settings)
        own = np.zeros(len(valid))
        own[valid] = ref.log_weights(
            surprise,
            ref.difficulty(signals, ref.volatility_weights(self.volatility)),
            surprise_strength=strength,
            pacing_strength=settings.pacing_strength * (1.0 - float(self.quality[0])),
        )
        weights, self.log_class_average = ref.sample_weights(
            own, group, self.log_class_average, self._decay, valid
        )
        return weights, signals

    def _surprise(
        self, nll: Array, entropy: Array, present: Array, settings: Settings
    ) -> tuple[float, Array]:
        shown = ref.trust(self.skill[: len(nll)])
        pressure = ref.noise_pressure(self.label_noise, shown[0])
        if settings.label_noise is not None:
            pressure = ref.noise_pressure(settings.label_noise)
        usual = np.where(self.seen > 0, -self.log_quality * self._share, np.inf)[: len(nll)]
        strength = settings.surprise_strength * float(pressure)
        return strength, ref.surprise(nll, entropy, present, shown**2, usual)

    def _lost(
        self,
        found: ref.HeadStatistics,
        losses: Array,
        whole: Array,
        logits: list[Array],
        mask: Array,
        heard: Array,
        settings: Settings,
    ) -> list[Array]:
        """Losses of samples held out, and slopes of the pool's, as far as labels are believed."""
        nll, entropy = (np.where(heard, x, 0.0) for x in (found.nll, found.entropy))
        strength, surprise = self._surprise(nll, entropy, mask, settings)
        believed = np.exp(np.maximum(-strength * surprise, -8.0))
        expected = np.zeros_like(nll)
        every = np.stack([x[heard] for x in logits])
        weight, shared = self.logit_weight[: len(nll)], 1.0 - float(self.quality[0])
        expected[:, heard] = ref.expected_log_likelihood(every, weight, shared, mask[:, heard])
        losses, whole = (np.where(heard & mask, x, 0.0) for x in (losses, whole))
        slopes = ref.logit_slopes(whole, expected, shared, heard & mask)
        return [believed * x for x in (losses, slopes)]

    def _take_in(self, nll: Array, counted: Array, weights: Array, signals: Array) -> None:
        first, second = self.seen[0] == 0, self.seen[0] == 1
        if counted[0].any():
            now = signals.mean(axis=1)
            change = 0.0 if first else ref.relative_change(now, self.signal_mean)
            self.volatility += (1.0 if second else self._rate) * (change - self.volatility)
            self.signal_mean += (1.0 if first else self._rate) * (now - self.signal_mean)
            w = weights[counted[0]]
            share = w.sum() ** 2 / (w @ w) / len(w)
            self.effective_share += (1.0 if first else self._rate) * (share - self.effective_share)
        for h, rows in enumerate(counted):
            if rows.any():
                mean = -np.average(nll[h, rows], weights=weights[rows])
                rate = self._rate * min(1.0, weights[rows].mean()) if self.seen[h] else 1.0
                self.log_quality[h] += rate * (mean - self.log_quality[h])
                self.seen[h] += 1
        self.log_quality[self.seen == 0] = self.log_quality[0]
        self.quality = ref.quality(self.log_quality, self._classes) * (self.seen[0] > 0)

    def _listen(
        self,
        heard: Array,
        prediction: Array,
        said: list[Array],
        samples: float,
    ) -> None:
        rate = self._rate * heard.any(axis=1)  # of a modality that was not heard they stay
        seen = self.class_seen[: min(self._classes, 1024)] + 1
        by_chance = (seen / seen.sum())[prediction % len(seen)]
        said = [np.ones(heard.shape), said[0], by_chance, *said[1:]]
        for average, x in zip(self.held_out_averages, said, strict=True):
            average += rate * (np.where(heard, x, 0.0).mean(axis=1) - average)
        mass, hits, chance, _, slope, doubt, alone = self.held_out_averages
        some = np.where(mass > 0, mass, 1.0)
        skill = ref.skill(hits / some, chance / some)
        self.skill = ref.pooled_skill(np.where(mass > 0, skill, skill[0]), samples)
        goal = ref.logit_weights(self.logit_weight, self.skill, slope / some, samples)
        self.logit_weight += rate * (goal - self.logit_weight)
        self.logit_weight[mass == 0] = self.logit_weight[0]
        shown = doubt[0] / mass[0], self.doubted, alone[0] / mass[0]
        self.label_noise = float(ref.seen_noise(*shown, self.skill))

    def _remember(self, index: Array, nll: Array, counted: Array, weights: Array) -> None:
        for i, row in enumerate(index):
            for h in np.flatnonzero(counted[:, i]):
                rate = max(self._memory_rate, 1.0 / (self.memory_visits[row, h] + 1.0))
                self.memory_nll[row, h] += rate * (nll[h, i] - self.memory_nll[row, h])
                self.memory_visits[row, h] += 1
            self.memory_weight[row] = weights[i]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "ignored": True},
    "masked": {"masked": True, "ignored": True},
    "weighted": {"weighted": True, "smoothing": 0.1, "ignored": True},
    "all of it": {"masked": True, "weighted": True, "smoothing": 0.1, "ignored": True},
    "skip": {"skip": True, "spoilt": "both", "masked": True},
    "skip, none": {"skip": True, "spoilt": "both", "reduction": "none", "weighted": True},
    "skip, nothing finite is left": {"skip": True, "spoilt": "trained"},
    "propagate, nothing finite is left": {"spoilt": "trained", "reduction": "none"},
    "propagate": {"spoilt": "held"},
    "propagate, none": {"spoilt": "both", "reduction": "none", "ignored": True},
    "a modality that is never there": {"masked": True, "lacking": True},
    "mixed": {"mixed": True},
    "mixed, from the other side": {"mixed": True, "late": True},
    "held whole": {"share": 0.5, "whole": True},
    "nothing of any weight is left": {"weighted": True, "worthless": True, "ignored": True},
    "none held": {"share": 1e-12},
    "the fusion alone": {"alone": True},
    "the fusion alone, masked, skip": {"alone": True, "masked": True, "skip": True},
    "the fusion alone, mixed": {"alone": True, "mixed": True},
    "known noise": {"noise": 0.1, "share": 0.0},
    "more classes than are told apart": {"classes": (0, 5, 1024, 1029, 1039)},
    "weighted, more classes than are told apart": {"weighted": True, "classes": (0, 5, 1039)},
}

SOFT_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"masked": True},
    "weighted": {"weighted": True, "smoothing": 0.1, "reduction": "sum"},
    "skip": {"skip": True, "spoilt": "both", "masked": True},
    "propagate, none": {"spoilt": "both", "reduction": "none"},
    "held whole": {"share": 0.5, "whole": True},
    "mixed": {"mixed": True},
    "the fusion alone": {"alone": True},
    "none held": {"share": 0.0},
}

# Of the fused head and each modality, down to where their losses count least.
SKILLS = [
    [0.0, 0.0, 0.0],
    [0.0, 0.2, 0.1],
    [0.05, 0.05, 0.05],
    [0.2, 0.2, 0.1],
    [0.2, 0.05, 0.3],
    [0.9, 0.1, 0.8],
    [0.2, 0.1],
]


def run_at_skills(
    backend: Any, device: torch.device, skills: list[float], lost: list[float] | None = None
) -> tuple[Tensor, Array]:
    """What the losses of modalities that are alike in all but skill count: got and expected.

    With ``lost``, they differ in the NLL of samples held out as well; of a NaN none were.
    """
    state = CurriculumState(len(skills) - 1)
    state.skill.copy_(torch.tensor(skills))
    expected = ref.loss_shares(skills)
    if lost is not None:
        heard = torch.tensor(lost)
        state.held_out_averages[0] = 0.5 * heard.isfinite()
        state.held_out_averages[3] = 0.5 * heard.nan_to_num()
        state.log_quality.fill_(-0.3)
        state.seen.fill_(1)
        usual = -0.95 * 0.3 - 0.05 * math.log(3)
        held_out = np.where(np.isnan(lost), 1.0, ref.quality(-np.nan_to_num(lost), 3))
        expected = expected * ref.generalisation(held_out, ref.quality(usual, 3))[1:]
    joint = backend.curriculum(
        [torch.zeros(4, 3, device=device)] * len(skills),
        None,
        Criterion(torch.zeros(4, dtype=torch.int64, device=device)),
        state.to(device).averages(),
        None,
        Settings(0.0, None, 0.0, 1.0, False, state.decay, state.memory_decay, "sum"),
    )
    return joint.coefficient[1:, 0], expected


def run(
    backend: Any,
    device: torch.device,
    *,
    reduction: Any = "mean",
    ignored: bool = False,
    masked: bool = False,
    lacking: bool = False,
    weighted: bool = False,
    smoothing: float = 0.0,
    skip: bool = False,
    spoilt: str | None = None,
    mixed: bool = False,
    late: bool = False,
    whole: bool = False,
    worthless: bool = False,
    alone: bool = False,
    share: float = 0.3,
    noise: float | None = None,
    soft: bool = False,
    classes: tuple[int, ...] = tuple(range(CLASSES)),
) -> list[tuple[str, Tensor, Array]]:
    """Six steps of a backend and of the specification: names, what was got and expected.

    ``spoilt``: which samples have logits that are not finite: some "held" out, all "trained" on,
    or some of "both". ``mixed``: every other step holds nothing out, ``late`` the first one.
    ``whole``: batches of which all would be held out. ``worthless``: all others have a class
    of weight 0. ``alone``: modalities tell nothing, and the fusion has learnt half of the samples
    trained on by heart. ``soft``: two steps of three have class probabilities as targets.
    ``classes``: those that occur, up to the largest there is.
    """
    generator = torch.Generator().manual_seed(0)
    state = CurriculumState(MODALITIES, num_samples=SAMPLES, decay=0.8, memory_decay=0.6)
    state = state.to(device)
    number = classes[-1] + 1
    truth = Specification(state.decay, state.memory_decay, number)
    options = {"ignore_index": -1, "label_smoothing": smoothing}
    weight = torch.rand(number, generator=generator) + 0.1 if weighted else None
    found: list[tuple[str, Tensor, Array]] = []
    for step in range(6):
        index = torch.randperm(SAMPLES, generator=generator)
        hashed = torch.from_numpy(ref.held_out(index.numpy(), share))
        index = index[hashed][:21] if whole else index[:21]
        hashed = torch.from_numpy(ref.held_out(index.numpy(), share))
        kind = torch.randint(len(classes), index.shape, generator=generator)
        seeming = (kind + (index % 3 == 0)) % len(classes)
        target, seeming = torch.tensor(classes)[kind], torch.tensor(classes)[seeming]
        logits = 2.0 * torch.randn(1 + MODALITIES, len(index), number, generator=generator)
        told = 1.25 * math.log(number) * torch.nn.functional.one_hot(seeming, number)
        if alone:
            by_heart = (~hashed & (index % 2 == 0)).unsqueeze(1)
            logits[0] += 4.0 * torch.where(
                by_heart, target.unsqueeze(1).eq(torch.arange(number)), told
            )
        else:
            logits += told
        if worthless:
            target[~hashed], weight[0] = 0, 0.0
        if ignored:
            target[1::4] = -1
        if soft and step % 3:
            certain = torch.nn.functional.one_hot(target, number)
            target = torch.rand(len(index), number, generator=generator) + 2.0 * certain
            target = torch.where(index.unsqueeze(1) % 4 == 0, certain, target / target.sum(1, True))
        present = None
        if masked:
            present = torch.rand(1 + MODALITIES, len(index), generator=generator) < 0.7
            present[0] = True
            present[-1] &= not lacking
            logits[~present] = torch.nan
        if spoilt == "trained":
            logits[0, ~hashed] = torch.nan
        elif spoilt is not None:
            logits[1, (hashed if spoilt == "held" else torch.ones_like(hashed)).nonzero()[:2]] = (
                torch.inf
            )
        holds = not (mixed and step % 2 == late)
        settings = Settings(
            4.0,
            noise,
            0.2,
            0.5,
            skip,
            state.decay,
            state.memory_decay,
            reduction,
            share if holds else 0.0,
        )
        joint = backend.curriculum(
            list(logits.to(device).unbind()),
            None if present is None else present.to(device),
            Criterion(
                target.to(device), None if weight is None else weight.to(device), -1, smoothing
            ),
            state.averages(),
            state.memory(index.to(device)) if holds or step != 3 else None,
            settings,
        )
        value, coefficient = truth(
            [x.double().numpy() for x in logits],
            None if present is None else present.numpy(),
            target.double().numpy() if target.is_floating_point() else target.numpy(),
            None if weight is None else weight.double().numpy(),
            options,
            index.numpy() if holds or step != 3 else None,
            settings,
        )
        found += [
            (f"value {step}", joint.value, value),
            (f"coefficient {step}", joint.coefficient, coefficient),
            *(
                (f"{name} {step}", x.clone(), np.copy(getattr(truth, name)))
                for name, x in state.named_buffers()
            ),
        ]
    return found
