"""Scales that formulas share, from the numbers of classes and of samples."""

from __future__ import annotations

import math


def per_log_classes(num_classes: int) -> float:
    """``1 / log C``, the scale from nats to shares of the largest entropy; 0 when C = 1."""
    return 1.0 / math.log(num_classes) if num_classes > 1 else 0.0


def own_share(samples: float, prior: float) -> float:
    """What so many samples held out say counts, against a prior worth so many."""
    return samples / (samples + prior)
