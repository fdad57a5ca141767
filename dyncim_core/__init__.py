"""Dynamic curriculum for imbalanced multimodal learning, for any training loop.

``DynCIMLoss`` wraps a criterion, ``GatedFusion`` fuses features, ``CurriculumState``
remembers. The quantities that they compute are pure functions, public here;
``dyncim_core.reference`` is their executable specification in NumPy.
"""

from dyncim_core.audit import input_suspicion, label_suspicion
from dyncim_core.fusion import FusionOutput, GatedFusion
from dyncim_core.gates import (
    disagreement,
    evenness,
    log_prior,
    novelty,
    novelty_penalty,
    relative_gates,
    reliability_gates,
)
from dyncim_core.heads import HeadStatistics, head_statistics
from dyncim_core.kernels import backends
from dyncim_core.loss import DynCIMLoss
from dyncim_core.modality import (
    augmentation_rates,
    balance_factor,
    expected_log_likelihood,
    generalisation,
    geometric_mean_ratio,
    harmonic_mean_improvement_rate,
    improvement_ratios,
    logit_slopes,
    logit_weights,
    loss_shares,
    modality_coefficients,
    modality_weights,
    pooled_skill,
    quality,
    redundancy,
    relative_logit_weights,
    skill,
    standing,
    trust,
    witnesses,
)
from dyncim_core.signals import (
    contradiction,
    difficulty,
    doubt,
    held_out,
    log_weights,
    noise_pressure,
    prediction_consistency,
    prediction_deviation,
    prediction_stability,
    relative_change,
    sample_weights,
    seen_noise,
    share_to_learn,
    sureness,
    surprise,
    target_entropy,
    volatility_weights,
)
from dyncim_core.state import CurriculumState, Suspects

__version__ = "0.1.0"

__all__ = [
    "CurriculumState",
    "DynCIMLoss",
    "FusionOutput",
    "GatedFusion",
    "HeadStatistics",
    "Suspects",
    "augmentation_rates",
    "backends",
    "balance_factor",
    "contradiction",
    "difficulty",
    "disagreement",
    "doubt",
    "evenness",
    "expected_log_likelihood",
    "generalisation",
    "geometric_mean_ratio",
    "harmonic_mean_improvement_rate",
    "head_statistics",
    "held_out",
    "improvement_ratios",
    "input_suspicion",
    "label_suspicion",
    "log_prior",
    "log_weights",
    "logit_slopes",
    "logit_weights",
    "loss_shares",
    "modality_coefficients",
    "modality_weights",
    "noise_pressure",
    "novelty",
    "novelty_penalty",
    "pooled_skill",
    "prediction_consistency",
    "prediction_deviation",
    "prediction_stability",
    "quality",
    "redundancy",
    "relative_change",
    "relative_gates",
    "relative_logit_weights",
    "reliability_gates",
    "sample_weights",
    "seen_noise",
    "share_to_learn",
    "skill",
    "standing",
    "sureness",
    "surprise",
    "target_entropy",
    "trust",
    "volatility_weights",
    "witnesses",
]
