"""The scale that formulas share, from the number of classes."""

from __future__ import annotations

import math


def per_log_classes(num_classes: int) -> float:
    """``1 / log C``, the scale from nats to shares of the largest entropy; 0 when C = 1."""
    return 1.0 / math.log(num_classes) if num_classes > 1 else 0.0


def own_share(samples: float) -> float:
    """Share of a head's own skill in ``pooled_skill``, found on so many samples held out."""
    return samples / (samples + 20.0)
