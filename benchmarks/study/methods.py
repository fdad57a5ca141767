"""The methods: each leaves the gradients of one step in its network's parameters.

Ideas from the papers cited, code of our own. Tests hold each to a fact its paper states.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from dyncim_core import CurriculumState, DynCIMLoss, improvement_ratios, loss_shares, trust
from dyncim_core.kernels.eager import generalised

from .models import (
    AttachedLogits,
    AttentionPool,
    Concatenation,
    FamiliarLogits,
    FeaturesAlone,
    Fusion,
    Gated,
    GatedUnderShare,
    Heads,
    LogitsThroughout,
    MeanOfLogits,
    MeanOfProbabilities,
    Network,
    OneModality,
    Overruled,
    Specialists,
    Uncounted,
)


class Rehearsal(NamedTuple):
    """Each head, the fused first, trained on 80% of the training set: ``[M + 1]`` each.

    Attributes:
        train: Loss on the 80%, before and after.
        held_out: Loss on the rest, before and after.
        hits: Share of the rest whose target the head predicts, after.
    """

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    hits: Tensor


@dataclass(frozen=True)
class Problem:
    """What a method may know before training.

    Attributes:
        modalities: Their names.
        num_samples: Size of the training set.
        epochs: Passes over it.
        steps: Number of steps of the training.
        network: Makes the network with a fusion, the same encoders for each method.
        rehearse: Trains another method, for some epochs, on 80% of the training set.
    """

    modalities: tuple[str, ...]
    num_samples: int
    epochs: int
    steps: int
    network: Callable[[Fusion], Network]
    rehearse: Callable[[Callable[[Problem], Method], int], Rehearsal]


class Method:
    """One method on one problem; subclasses override what differs.

    Attributes:
        network: What it trains.
        state: Its ``CurriculumState``, if it has one.
    """

    fusion: Fusion = Concatenation
    state: CurriculumState | None = None

    def __init__(self, problem: Problem) -> None:
        self.network = problem.network(self.fusion)

    def parameters(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        return [{"params": list(self.network.parameters())}]

    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Of a batch; ``index`` are its positions in the training set."""
        raise NotImplementedError

    def backward(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> None:
        """Leave the gradients of one step in the parameters."""
        torch.autograd.backward(self.loss(self.network(inputs), target, index))

    def finish(self) -> None:
        """After the last step."""


def head_losses(heads: Heads, target: Tensor) -> list[Tensor]:
    """Cross-entropy of each head, the fused first."""
    return [F.cross_entropy(logits, target) for logits in heads.all()]


def expected(values: Tensor, target: Tensor) -> Tensor:
    """The value of the target class, or its mean under target probabilities, ``[B]``."""
    if target.is_floating_point():
        return (values * target).sum(dim=1)
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


class _Decayed(Method):
    """The methods without a hyperparameter of their own: what is tuned is weight decay."""

    def __init__(self, problem: Problem, decay: float) -> None:
        super().__init__(problem)
        self.decay = decay

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.network.parameters()), "weight_decay": self.decay}]


class Joint(_Decayed):
    """Cross-entropy of a head over concatenated features."""

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Of the fused head alone."""
        return F.cross_entropy(heads.fused, target)


class StoppedEarly(Joint):
    """Joint training that ends with the weights best on a tenth of the training set held out.

    The usual early stopping, by cross-entropy on labels as they are. Each epoch, a sample held out
    is judged when its batch comes.
    """

    def __init__(self, problem: Problem, decay: float) -> None:
        super().__init__(problem, decay)
        order = torch.randperm(problem.num_samples, generator=torch.Generator().manual_seed(0))
        self.held_out = order < max(1, problem.num_samples // 10)
        self.per_epoch = problem.steps // problem.epochs
        self.step, self.total, self.number = 0, 0.0, 0
        self.least, self.best = float("inf"), copy.deepcopy(self.network.state_dict())

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Of the fused head, over what is not held out."""
        held = self.held_out[index]
        losses = F.cross_entropy(heads.fused, target, reduction="none")
        self.step += 1
        self.total += float(losses.detach()[held].sum())
        self.number += int(held.sum())
        if self.step % self.per_epoch == 0 and self.number:
            mean = self.total / self.number
            if mean < self.least:
                self.least, self.best = mean, copy.deepcopy(self.network.state_dict())
            self.total, self.number = 0.0, 0
        return torch.where(held, 0.0, losses).sum() / (~held).sum().clamp_min(1)

    @override
    def finish(self) -> None:
        self.network.load_state_dict(self.best)


class Late(_Decayed):
    """Each modality trained alone; the prediction is the mean of their logits."""

    fusion: Fusion = MeanOfLogits

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """No parameter is shared, so the sum trains each modality alone."""
        return torch.stack(head_losses(heads, target)[1:]).sum()


class LateSum(Late):
    """Each modality trained alone; the prediction is the mean of their probabilities.

    The sum rule of Kittler, Hatef, Duin, Matas: "On Combining Classifiers", TPAMI 1998, which
    errors of a single classifier harm less than a product.
    """

    fusion: Fusion = MeanOfProbabilities


class LateNovelty(Late):
    """``Late`` that trusts a modality less the further its features are from those of training.

    By Mahalanobis distance, after Lee, Lee, Lee, Shin: "A Simple Unified Framework for Detecting
    Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018.
    """

    fusion: Fusion = FamiliarLogits


class LateGce(Late):
    """Each modality trained alone, by generalised cross-entropy."""

    def __init__(self, problem: Problem, q: float) -> None:
        super().__init__(problem, decay=0.0)
        self.q = q

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """No parameter is shared, so the sum trains each modality alone."""
        unimodal = heads.unimodal.values()
        losses = [generalised_cross_entropy(x, target, self.q).mean() for x in unimodal]
        return torch.stack(losses).sum()


class Single(Late):
    """The best modality alone: the one best on 20% held out of the training set."""

    def __init__(self, problem: Problem, decay: float) -> None:
        found = problem.rehearse(partial(Late, decay=decay), problem.epochs)
        self.fusion = partial(OneModality, position=int(found.hits[1:].argmax()))
        super().__init__(problem, decay)


class Uniform(Method):
    """Joint training plus one equal loss for each modality: the honest baseline."""

    def __init__(self, problem: Problem, weight: float = 1.0) -> None:
        super().__init__(problem)
        self.weight = weight

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Fused loss and weighted unimodal ones."""
        fused, *unimodal = head_losses(heads, target)
        return fused + self.weight * torch.stack(unimodal).sum()


class UniformSpecialists(Uniform):
    """How far one can get where one modality is absent: by networks that know which."""

    network: Specialists

    def __init__(self, problem: Problem, weight: float = 1.0) -> None:
        super().__init__(problem, weight)
        lacking = [problem.network(self.fusion) for _ in problem.modalities]
        self.network = Specialists(self.network, lacking)

    @override
    def backward(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> None:
        super().backward(inputs, target, index)
        for network, mask in self.network.each(len(target)):
            torch.autograd.backward(self.loss(network(inputs, mask), target, index))


class OgmGe(Joint):
    """On-the-fly gradient modulation with generalisation enhancement.

    Peng, Wei, Deng, Wang, Hu: "Balanced Multimodal Learning via On-the-fly Gradient
    Modulation", CVPR 2022. With more than two modalities, each is compared with the mean
    of the others.
    """

    def __init__(self, problem: Problem, alpha: float) -> None:
        super().__init__(problem, decay=0.0)
        self.alpha = alpha

    @override
    def backward(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> None:
        heads = self.network(inputs)
        torch.autograd.backward(self.loss(heads, target, index))
        fusion = self.network.fusion
        assert isinstance(fusion, Concatenation)
        with torch.no_grad():
            parts = fusion.parts(heads.features)
            scores = torch.stack([expected(x.softmax(dim=1), target).sum() for x in parts])
            factors = ogm_coefficients(scores, self.alpha).tolist()
            for encoder, factor in zip(self.network.encoders.values(), factors, strict=True):
                for gradient in gradients(encoder):
                    gradient.mul_(factor)
                    gradient.add_(torch.randn_like(gradient) * gradient.std())


def ogm_coefficients(scores: Tensor, alpha: float) -> Tensor:
    """``1 - tanh(alpha * ratio)`` for modalities ahead of the others, 1 for the rest."""
    ratio = scores * (len(scores) - 1) / (scores.sum() - scores)
    return torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), 1.0)


class GBlend(Method):
    """Gradient blending: losses weighted by generalisation over squared overfitting.

    Wang, Tran, Feiszli: "What Makes Training Multi-Modal Classification Networks Hard?",
    CVPR 2020 (offline). The weights are estimated with ``epochs`` of uniform losses. A head whose
    loss on what is held out grew gets next to none, and is hardly trained.
    """

    def __init__(self, problem: Problem, epochs: float) -> None:
        super().__init__(problem)
        found = problem.rehearse(Uniform, round(epochs))
        self.weights = blend_weights(found.train, found.held_out)

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Weighted sum over the heads."""
        return (self.weights * torch.stack(head_losses(heads, target))).sum()


def blend_weights(train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Tensor:
    """``G / O^2``, normalised: G the fall of the held-out loss, O the growth of the gap."""
    gain = (held_out[0] - held_out[1]).clamp_min(1e-6)
    overfit = (held_out[1] - train[1]) - (held_out[0] - train[0])
    weights = gain / overfit.square().clamp_min(1e-6)
    return weights / weights.sum()


class MMPareto(Uniform):
    """Gradients of the fused and the unimodal loss, combined without conflict.

    Wei, Hu: "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance",
    ICML 2024.
    """

    def __init__(self, problem: Problem, scale: float) -> None:
        super().__init__(problem)
        self.scale = scale

    @override
    def backward(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> None:
        fused, *unimodal = head_losses(self.network(inputs), target)
        torch.autograd.backward(fused, retain_graph=True)
        encoders = list(self.network.encoders.values())
        joint = [flat(gradients(encoder)) for encoder in encoders]
        for encoder in encoders:
            encoder.zero_grad()
        torch.autograd.backward(unimodal)
        for encoder, first in zip(encoders, joint, strict=True):
            own = gradients(encoder)
            combined = pareto_gradient(first, flat(own), self.scale)
            for gradient, part in zip(
                own, torch.split(combined, [g.numel() for g in own]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))


def pareto_gradient(joint: Tensor, own: Tensor, scale: float) -> Tensor:
    """The sum; if they conflict, the least-norm convex combination, as long as the sum."""
    total = joint + own
    if joint @ own >= 0:
        return total
    share = (own @ (own - joint)) / (joint - own).square().sum()
    direction = share * joint + (1 - share) * own
    length: Tensor = scale * total.norm() / direction.norm().clamp_min(1e-12)
    return length * direction


class Uncertainty(Method):
    """One learnt log-variance s for each head: ``exp(-s) loss + s``.

    Kendall, Gal, Cipolla: "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR
    2018.
    """

    def __init__(self, problem: Problem, rate: float) -> None:
        super().__init__(problem)
        self.rate = rate
        self.log_variance = nn.Parameter(torch.zeros(1 + len(problem.modalities)))

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [*super().parameters(), {"params": [self.log_variance], "lr": self.rate}]

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Weighted sum over the heads."""
        return uncertainty_loss(torch.stack(head_losses(heads, target)), self.log_variance)


def uncertainty_loss(losses: Tensor, log_variance: Tensor) -> Tensor:
    """``sum exp(-s) loss + s``, least in s where ``exp(-s) = 1 / loss``."""
    return (torch.exp(-log_variance) * losses + log_variance).sum()


class SmallLoss(Method):
    """Only the samples of a batch with small loss count; the share dropped grows first.

    Han et al.: "Co-teaching", NeurIPS 2018 (its selection, with one network), after
    Kumar, Packer, Koller: "Self-Paced Learning", NeurIPS 2010. On top of uniform losses.
    """

    def __init__(self, problem: Problem, dropped: float) -> None:
        super().__init__(problem)
        self.dropped = dropped
        self.ramp, self.step = problem.steps / 4, 0

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Mean over the samples kept."""
        losses = torch.stack(
            [F.cross_entropy(x, target, reduction="none") for x in heads.all()]
        ).sum(dim=0)
        self.step += 1
        return losses[smallest(losses, self.dropped * min(1.0, self.step / self.ramp))].mean()


def smallest(losses: Tensor, dropped: float) -> Tensor:
    """Positions of all but the share with the largest losses."""
    return losses.topk(max(1, round(len(losses) * (1 - dropped))), largest=False).indices


class GeneralisedCrossEntropy(Method):
    """``(1 - p^q) / q`` for every head, on top of uniform losses.

    Zhang, Sabuncu: "Generalized Cross Entropy Loss for Training Deep Neural Networks with
    Noisy Labels", NeurIPS 2018.
    """

    def __init__(self, problem: Problem, q: float) -> None:
        super().__init__(problem)
        self.q = q

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Sum over the heads."""
        losses = [generalised_cross_entropy(x, target, self.q).mean() for x in heads.all()]
        return torch.stack(losses).sum()


def generalised_cross_entropy(logits: Tensor, target: Tensor, q: float) -> Tensor:
    """``(1 - p^q) / q`` of each sample: cross-entropy as q goes to 0, ``1 - p`` at 1."""
    return expected(-torch.expm1(q * logits.log_softmax(dim=1)) / q, target)


class ModalityDropout(Uniform):
    """A share of the samples misses one random modality, on top of uniform losses.

    After Neverova, Wolf, Taylor, Nebout: "ModDrop", TPAMI 2016.
    """

    def __init__(self, problem: Problem, share: float) -> None:
        super().__init__(problem)
        self.share = share

    @override
    def backward(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> None:
        present = drop_one(len(index), len(inputs), self.share)
        torch.autograd.backward(self.loss(self.network(inputs, present), target, index))


def drop_one(size: int, modalities: int, share: float) -> Tensor:
    """Mask of what is present, bool ``[size, modalities]``."""
    dropped = torch.randint(modalities, (size, 1))
    return (torch.arange(modalities) != dropped) | (torch.rand(size, 1) >= share)


class Aecf(Uniform):
    """The fusion layer of the package ``aecf`` and its penalty, on top of uniform losses.

    "Adaptive Entropy-Gated Contrastive Fusion", arXiv 2505.15417.
    """

    fusion: Fusion = AttentionPool

    def __init__(self, problem: Problem, strength: float) -> None:
        super().__init__(problem)
        self.strength = strength

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """Uniform losses and the penalty on the attention's entropy."""
        fusion = self.network.fusion
        assert isinstance(fusion, AttentionPool)
        return super().loss(heads, target, index) + self.strength * fusion.penalty


class DynCIM(_Decayed):
    """The toolkit, as its README shows.

    Ablations replace ``gate``, which makes the fusion from the state; ``options`` go to
    ``DynCIMLoss``.
    """

    def __init__(
        self,
        problem: Problem,
        decay: float,
        *,
        gate: Callable[[CurriculumState], Fusion] = lambda state: partial(Gated, state=state),
        **options: Any,
    ) -> None:
        self.state = CurriculumState(problem.modalities, num_samples=problem.num_samples)
        self.fusion = gate(self.state)
        super().__init__(problem, decay)
        self.objective = DynCIMLoss(nn.CrossEntropyLoss(), state=self.state, **options)

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """The joint objective."""
        loss: Tensor = self.objective(heads.fused, target, unimodal=heads.unimodal, index=index)
        return loss


class EqualModalities(DynCIM):
    """Ablation, of the losses alone: that of a sample counts alike for each of its modalities."""

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """The joint objective, by other factors."""
        logits = [x.detach().requires_grad_() for x in heads.all()]
        unimodal = dict(zip(heads.unimodal, logits[1:], strict=True))
        objective = super().loss(heads._replace(fused=logits[0], unimodal=unimodal), target, index)
        truth = target
        if not target.is_floating_point():
            truth = F.one_hot(target, logits[0].shape[1]).float()
        factors = []
        for x, gradient in zip(logits, torch.autograd.grad(objective, logits), strict=True):
            own = x.detach().softmax(dim=1) - truth  # the gradient of its loss, times a factor
            factors.append((gradient * own).sum(dim=1) / own.square().sum(dim=1).clamp_min(1e-12))
        weights = torch.stack(factors)
        weights[1:] = self.change(weights[1:])
        losses = [F.cross_entropy(x, target, reduction="none") for x in heads.all()]
        return (weights * torch.stack(losses)).sum()

    def change(self, weights: Tensor) -> Tensor:
        """Of each modality and sample, ``[M, B]``: averaged over its modalities."""
        return weights.mean(dim=0)


class WholeLosses(EqualModalities):
    """Ablation: the losses of a modality count whatever the skills."""

    @override
    def change(self, weights: Tensor) -> Tensor:
        """Of each modality and sample, ``[M, B]``: without the share that skills leave."""
        return weights / loss_shares(self.objective.state.skill).unsqueeze(1)


class NoGeneralisation(EqualModalities):
    """Ablation: the losses of a modality count whether what it learns holds elsewhere or not."""

    @override
    def change(self, weights: Tensor) -> Tensor:
        """Of each modality and sample, ``[M, B]``: without the share that generalisation leaves."""
        head = next(self.network.heads.children())
        assert isinstance(head, nn.Linear)
        holds = generalised(self.objective.state.averages(), head.out_features)
        return weights / holds[1:].unsqueeze(1)


class NoFusedWitness(DynCIM):
    """Ablation: the fusion alone sees no label noise, only all able heads together do."""

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """The joint objective."""
        assert self.state is not None
        self.state.doubted.fill_(2.0)  # more than of samples held out: nothing learnt by heart
        return super().loss(heads, target, index)


DROPOUT = 0.5  # GatedFusion's, at full redundancy


def no_gate(state: CurriculumState) -> Fusion:
    """Ablation: plain concatenation, without dropout."""
    return Concatenation


def no_skill(state: CurriculumState) -> Fusion:
    """Ablation: the fusion takes all modalities alike, whatever their skill."""
    return partial(Overruled, state=state, name="skill", value=0.0)


def no_prior(state: CurriculumState) -> Fusion:
    """Ablation: the gates and the gated logits take what is frequent for something told."""
    return partial(Uncounted, state=state)


def no_novelty(state: CurriculumState) -> Fusion:
    """Ablation: the gates of inference do not look at how novel the features are."""
    return partial(Gated, state=state, novelty_slope=0.0)


def whole_logits(state: CurriculumState) -> Fusion:
    """Ablation: gated logits count in full, whatever samples held out say of them."""
    return partial(Overruled, state=state, name="logit_weight", value=1.0)


def attached_logits(state: CurriculumState) -> Fusion:
    """Variant: gated logits are not detached; unimodal heads learn from the fused loss too."""
    return partial(AttachedLogits, state=state)


def throughout(state: CurriculumState) -> Fusion:
    """Ablation: the head always learns with the gated logits in full."""
    return partial(LogitsThroughout, state=state)


def no_logits(state: CurriculumState) -> Fusion:
    """Ablation: the fused head alone, without gated logits."""
    return partial(FeaturesAlone, state=state)


def constant_gate(state: CurriculumState) -> Fusion:
    """Ablation: the fusion without the state: all modalities alike, half the full dropout."""
    return partial(Gated, dropout=DROPOUT / 2)


def constant_dropout(state: CurriculumState) -> Fusion:
    """Ablation: dropout does not follow redundancy; it is half the full one."""
    return partial(GatedUnderShare, state=state, share=lambda state: DROPOUT / 2)


def shifted_hmir(state: CurriculumState) -> Fusion:
    """Ablation: dropout follows the redundancy of ``shifted_redundancy``."""
    return partial(
        GatedUnderShare, state=state, share=lambda state: DROPOUT * shifted_redundancy(state)
    )


def shifted_redundancy(state: CurriculumState) -> Tensor:
    """``redundancy`` with the harmonic mean of the ratios for ``1 + HMIR``: without a floor."""
    shown = trust(state.skill)
    behind = improvement_ratios(state.log_quality).reciprocal().mean()
    shown_behind = (shown[1:] / shown[0]).mean()
    return torch.minimum(state.quality[0] * behind.pow(4), shown[0] * shown_behind.pow(4))


class OneSignal(DynCIM):
    """Ablation: the difficulty is one signal alone, as if the others had never moved."""

    def __init__(self, problem: Problem, decay: float, *, signal: int) -> None:
        super().__init__(problem, decay)
        self.signal = signal

    @override
    def loss(self, heads: Heads, target: Tensor, index: Tensor) -> Tensor:
        """The joint objective."""
        assert self.state is not None
        self.state.volatility.zero_()[self.signal] = 1.0
        return super().loss(heads, target, index)


def gradients(module: nn.Module) -> list[Tensor]:
    """Gradients of its parameters, to change in place."""
    return [x.grad for x in module.parameters() if x.grad is not None]


def flat(tensors: list[Tensor]) -> Tensor:
    """One vector, a copy."""
    return torch.cat([x.flatten() for x in tensors])


@dataclass(frozen=True)
class Entry:
    """A method by name.

    Attributes:
        make: Makes it for a problem, with a setting.
        setting: Name of its hyperparameter.
        grid: The values that tuning tries; the middle one until it has. Empty for an
            ablation, which takes the setting of the whole.
        needs: Package that it needs.
    """

    make: Callable[[Problem, float], Method]
    setting: str = ""
    grid: tuple[float, ...] = ()
    needs: str = ""

    def build(self, problem: Problem, setting: float) -> Method:
        """The method, on a problem."""
        return self.make(problem, setting)

    def missing(self) -> str:
        """Why it cannot run here, if it cannot."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"needs the package {self.needs} (pip install --no-deps {self.needs})"
        return ""


_DECAY = ("weight decay", (0.0, 1e-4, 1e-3))
NO_SAMPLE_LEVEL: dict[str, Any] = {"surprise_strength": 0.0, "pacing_strength": 0.0}

CEILING = "uniform/specialists"

METHODS: dict[str, Entry] = {
    "single": Entry(Single, *_DECAY),
    "late": Entry(Late, *_DECAY),
    "late_sum": Entry(LateSum, *_DECAY),
    "late_novelty": Entry(LateNovelty, *_DECAY),
    "late_gce": Entry(LateGce, "q", (0.3, 0.7, 0.9)),
    "joint": Entry(Joint, *_DECAY),
    "early": Entry(StoppedEarly, *_DECAY),
    "uniform": Entry(Uniform, "weight of each unimodal loss", (0.5, 1.0, 2.0)),
    CEILING: Entry(UniformSpecialists),
    "ogm_ge": Entry(OgmGe, "alpha", (0.1, 0.3, 0.8)),
    "gblend": Entry(GBlend, "epochs of the estimate", (5.0, 10.0, 20.0)),
    "mmpareto": Entry(MMPareto, "scale", (1.0, 1.5, 2.0)),
    "uncertainty": Entry(Uncertainty, "learning rate of s", (1e-3, 1e-2, 1e-1)),
    "small_loss": Entry(SmallLoss, "share dropped", (0.1, 0.25, 0.4)),
    "gce": Entry(GeneralisedCrossEntropy, "q", (0.3, 0.7, 0.9)),
    "modality_dropout": Entry(ModalityDropout, "share", (0.1, 0.25, 0.5)),
    "aecf": Entry(Aecf, "strength of the penalty", (0.01, 0.1, 1.0), needs="aecf"),
    "dyncim": Entry(DynCIM, *_DECAY),
    "dyncim/no-sample-level": Entry(partial(DynCIM, **NO_SAMPLE_LEVEL)),
    "dyncim/no-modality-level": Entry(partial(EqualModalities, gate=constant_gate)),
    "dyncim/equal-losses": Entry(EqualModalities),
    "dyncim/whole-losses": Entry(WholeLosses),
    "dyncim/no-generalisation": Entry(NoGeneralisation),
    "dyncim/constant-dropout": Entry(partial(DynCIM, gate=constant_dropout)),
    "dyncim/shifted-hmir": Entry(partial(DynCIM, gate=shifted_hmir)),
    "dyncim/no-gate": Entry(partial(DynCIM, gate=no_gate)),
    "dyncim/no-novelty": Entry(partial(DynCIM, gate=no_novelty)),
    "dyncim/no-prior": Entry(partial(DynCIM, gate=no_prior)),
    "dyncim/whole-logits": Entry(partial(DynCIM, gate=whole_logits)),
    "dyncim/logits-throughout": Entry(partial(DynCIM, gate=throughout)),
    "dyncim/attached-logits": Entry(partial(DynCIM, gate=attached_logits)),
    "dyncim/no-logits": Entry(partial(DynCIM, gate=no_logits)),
    "dyncim/gate-alone": Entry(partial(EqualModalities, **NO_SAMPLE_LEVEL)),
    "dyncim/no-pacing": Entry(partial(DynCIM, pacing_strength=0.0)),
    "dyncim/no-surprise": Entry(partial(DynCIM, surprise_strength=0.0)),
    "dyncim/no-skill": Entry(partial(DynCIM, gate=no_skill)),
    "dyncim/no-held-out": Entry(partial(DynCIM, held_out=0.0)),
    "dyncim/no-fused-witness": Entry(NoFusedWitness),
    "dyncim/constant-strength": Entry(partial(DynCIM, label_noise=1.0)),
    "dyncim/deviation-alone": Entry(partial(OneSignal, signal=0)),
    "dyncim/consistency-alone": Entry(partial(OneSignal, signal=1)),
    "dyncim/stability-alone": Entry(partial(OneSignal, signal=2)),
}


def peers() -> Iterator[str]:
    """Names of the methods that are no ablation and no ceiling."""
    return (name for name in METHODS if "/" not in name)
