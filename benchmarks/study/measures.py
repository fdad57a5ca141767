"""What is measured of a trained network."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Array = NDArray[np.float64]


def calibration_error(probabilities: Tensor, truth: Tensor, bins: int = 15) -> float:
    """Expected calibration error, in percent, over bins of confidence of equal width."""
    confidence, predicted = probabilities.double().max(dim=1)
    gap = confidence - (predicted == truth).double()
    which = (confidence * bins).long().clamp_max(bins - 1)
    return 100.0 * float(
        torch.zeros(bins).double().index_add_(0, which, gap).abs().sum() / len(gap)
    )


def probe(train: Tensor, target: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Probabilities for ``test`` of a logistic regression on frozen features ``train``."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-3
    train, test = (train - mean) / std, (test - mean) / std
    linear = nn.Linear(train.shape[1], num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(train), target) + 0.005 * linear.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return torch.softmax(linear(test), dim=1)


def auroc(score: Array, wrong: NDArray[np.bool_]) -> float:
    """Chance that a wrong sample scores above a right one, ties half."""
    from scipy.stats import rankdata  # the extra "study"

    ranks = rankdata(score)[wrong]
    count = len(ranks)
    return float((ranks.sum() - count * (count + 1) / 2) / (count * (len(score) - count)))


def doubt(inputs: list[Tensor], labels: Tensor) -> tuple[Array, str]:
    """How doubtful each label looks without any of this: cleanlab's score, and whose code.

    One minus the self-confidence: the probability that a logistic regression on all
    inputs, in 5-fold cross-validation, gives to the label.
    """
    from sklearn.linear_model import LogisticRegression  # the extra "study"
    from sklearn.model_selection import cross_val_predict

    x = torch.cat([view.flatten(1) for view in inputs], dim=1).numpy()
    y = labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 100 steps: it ranks all the same
        probabilities = cross_val_predict(
            LogisticRegression(max_iter=100), x, y, cv=5, method="predict_proba"
        )
    try:
        from cleanlab import __version__
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return 1.0 - self_confidence(probabilities, y), "own self-confidence"
    quality = get_label_quality_scores(y, probabilities, method="self_confidence")
    return 1.0 - np.asarray(quality, dtype=np.float64), f"cleanlab {__version__}"


def self_confidence(probabilities: Array, labels: NDArray[np.int64]) -> Array:
    """Probability given to each label."""
    confidence: Array = probabilities[np.arange(len(labels)), labels]
    return confidence


def epochs_to(curve: Array, level: float, marks: int = 1) -> float:
    """Epochs until a curve of so many marks an epoch reaches a level; infinite if never."""
    reached = np.flatnonzero(curve >= level)
    return float(reached[0] + 1) / marks if len(reached) else float("inf")
