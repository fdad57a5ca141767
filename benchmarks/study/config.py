"""What one run is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

# Raise it when a change of the study or of the package changes what a run would give:
# runs stored under another version are not reused.
STUDY = 1


@dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
        data: A name that ``data.load`` knows.
        condition: A name in ``conditions.CONDITIONS``.
        method: A name in ``methods.METHODS``.
        setting: The method's one hyperparameter.
        seed: Of the split, the corruption, the weights and the batches.
        epochs: Passes over the full training set, before what the condition multiplies.
    """

    data: str
    condition: str
    method: str
    setting: float
    seed: int
    epochs: int

    @property
    def key(self) -> str:
        """Hash of everything above and the version of the study."""
        text = json.dumps({"study": STUDY, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
