"""The tasks: inputs by modality, split into training and test by seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .drawn import TEST, draw

REPOSITORY = Path(__file__).parents[2]
UCI = REPOSITORY / "examples" / "data" / "uci_multiple_features.npz"
SPOKEN = REPOSITORY.parent / "shared" / "data" / "free_spoken_digits.npz"
# How often an epoch the test score is taken; where few epochs decide, more often.
MARKS = {
    "uci": 1,
    "odd": 1,
    "digits": 1,
    "starving": 4,
    "dominated": 1,
    "overlap": 1,
    "together": 1,
    "rare": 1,
    "question": 1,
    "reference": 1,
    "common": 1,
    "drawn": 1,
    "diabetes": 1,
}
EPOCHS = {
    "uci": 40,
    "odd": 40,
    "digits": 15,
    "starving": 40,
    "dominated": 40,
    "overlap": 10,
    "together": 40,
    "rare": 40,
    "question": 40,
    "reference": 40,
    "common": 40,
    "drawn": 40,
    "diabetes": 60,
}


@dataclass(frozen=True)
class Split:
    """One seed's data.

    Attributes:
        train: Training inputs by modality.
        truth: Of the training samples: classes, int64 ``[N]``, or, for a regression,
            probabilities of the bins, ``[N, C]``.
        target: What is trained on: the truth, but for label noise.
        test: Test inputs by modality.
        test_truth: Classes, or values of a regression.
        num_classes: Classes, or bins.
        centres: Of the bins of a regression.
        hidden: Units of the hidden layer that the fused head needs; 0 for a linear one.
    """

    train: dict[str, Tensor]
    truth: Tensor
    target: Tensor
    test: dict[str, Tensor]
    test_truth: Tensor
    num_classes: int
    centres: Tensor | None = None
    hidden: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self.train)

    def take(self, index: Tensor) -> Split:
        """Only these training samples."""
        train = {name: x[index] for name, x in self.train.items()}
        return replace(self, train=train, truth=self.truth[index], target=self.target[index])

    def score(self, probabilities: Tensor) -> float:
        """Of predictions for the test set, larger is better.

        Accuracy in percent; of a regression, minus the mean absolute error.
        """
        if self.centres is None:
            return 100.0 * float((probabilities.argmax(dim=1) == self.test_truth).double().mean())
        return -float((probabilities @ self.centres - self.test_truth).abs().mean())


def family(name: str) -> str:
    """The part of a task's name before the colon."""
    return name.partition(":")[0]


def load(name: str, seed: int, spoken: Path = SPOKEN) -> Split:
    """A task's split, in the data's own units.

    Args:
        name: ``uci:VIEW+VIEW...``, ``odd:VIEW+VIEW...``, ``digits``, ``starving``,
            ``dominated``, ``overlap``, ``together``, ``rare``, ``question``, ``reference``,
            ``common``, ``drawn`` or ``diabetes``.
        seed: Of the split, and of what is drawn.
        spoken: The spoken digits, for ``digits``.

    Raises:
        ValueError: No such task.
    """
    rng = np.random.default_rng(seed)
    if name.startswith("uci:"):
        return _uci(name.removeprefix("uci:").split("+"), rng)
    if name.startswith("odd:"):
        return _odd(name.removeprefix("odd:").split("+"), rng)
    if name == "digits":
        return _digits(rng, spoken)
    tasks = {
        "starving": _starving,
        "dominated": _dominated,
        "overlap": _overlap,
        "together": _together,
        "rare": _rare,
        "question": _question,
        "reference": _reference,
        "common": _common,
        "drawn": _drawn,
        "diabetes": _diabetes,
    }
    if name not in tasks:
        raise ValueError(
            f"data: expected uci:VIEWS, odd:VIEWS, digits or one of {list(tasks)}, got {name!r}"
        )
    return tasks[name](rng)


def standardise(split: Split) -> Split:
    """Mean 0 and deviation 1 on the training set: each feature, or each image as a whole."""
    train, test = {}, {}
    for name, x in split.train.items():
        over = [0] if x.dim() == 2 else list(range(x.dim()))
        mean, std = x.mean(dim=over), x.std(dim=over) + 1e-6
        train[name], test[name] = (x - mean) / std, (split.test[name] - mean) / std
    return replace(split, train=train, test=test)


def _split(
    inputs: dict[str, Tensor],
    truth: Tensor,
    test_truth: Tensor,
    train: Any,
    test: Any,
    classes: int,
) -> Split:
    return Split(
        {name: x[train] for name, x in inputs.items()},
        truth[train],
        truth[train],
        {name: x[test] for name, x in inputs.items()},
        test_truth[test],
        classes,
    )


@lru_cache(maxsize=1)
def _uci_arrays() -> dict[str, NDArray[Any]]:
    with np.load(UCI) as archive:
        return dict(archive)


def _uci(views: list[str], rng: np.random.Generator) -> Split:
    """Feature views of the same 2,000 handwritten digits; 1,000 to train, 1,000 to test."""
    arrays = _uci_arrays()
    inputs = {view: torch.from_numpy(arrays[view].astype(np.float32)) for view in views}
    label = torch.from_numpy(arrays["label"].astype(np.int64))
    order = torch.from_numpy(rng.permutation(len(label)))
    return _split(inputs, label, label, order[:1000], order[1000:], 10)


def _odd(views: list[str], rng: np.random.Generator) -> Split:
    """The same, asked only whether the digit is odd: two classes."""
    split = _uci(views, rng)
    truth = split.truth % 2
    return replace(split, truth=truth, target=truth, test_truth=split.test_truth % 2, num_classes=2)


def _starving(rng: np.random.Generator) -> Split:
    """An easy modality starves a better one.

    ``easy``: six of 512 features show each of 8 classes, linearly, but for a fifth of the
    samples another one, which the noise in the rest allows to memorise. ``hard``: each of
    the class's three bits is the sign of a product of two features. Joint training fits
    its training set by ``easy`` before ``hard`` is learnt.
    """
    size, classes, width, bits, copies = 3000, 8, 512, 3, 6
    label = rng.integers(classes, size=size)
    hard = rng.standard_normal((size, 2 * bits)).astype(np.float32)
    for bit in range(bits):
        first, second = hard[:, 2 * bit], hard[:, 2 * bit + 1]
        first *= np.sign(first * second) * np.where(label >> bit & 1, -1, 1)
    easy = rng.standard_normal((size, width)).astype(np.float32)
    shown = np.where(rng.random(size) < 0.8, label, rng.integers(classes, size=size))
    for copy in range(copies):
        easy[np.arange(size), classes * copy + shown] += 3.0
    inputs = {"easy": torch.from_numpy(easy), "hard": torch.from_numpy(hard)}
    truth = torch.from_numpy(label)
    return _split(inputs, truth, truth, slice(0, 1000), slice(1000, None), classes)


def _dominated(rng: np.random.Generator) -> Split:
    """One modality carries the task, two are next to noise, and all can be learnt by heart.

    Two classes, as in sentiment from text, audio and video: a few features of each modality
    are shifted towards the class, those of ``text`` by far the most.
    """
    size = 3000
    label = rng.integers(2, size=size)
    inputs = {}
    for name, width, count, shift in (
        ("text", 300, 5, 0.35),
        ("audio", 74, 2, 0.08),
        ("video", 35, 2, 0.06),
    ):
        x = rng.standard_normal((size, width)).astype(np.float32)
        x[:, :count] += shift * (2 * label[:, None] - 1)
        inputs[name] = torch.from_numpy(x)
    truth = torch.from_numpy(label)
    return _split(inputs, truth, truth, slice(0, 1000), slice(1000, None), 2)


def _overlap(rng: np.random.Generator) -> Split:
    """Classes that no method can tell apart well, and samples enough to learn what there is.

    As where emotions or opinions are rated: what is left of the error is no mistake of labels.
    """
    size, train, classes = 6000, 4000, 4
    label = rng.integers(classes, size=size)
    inputs = {}
    for name in ("voice", "face", "words"):
        means = rng.standard_normal((classes, 12))
        x = means[label] + 5.0 * rng.standard_normal((size, 12))
        inputs[name] = torch.from_numpy(x.astype(np.float32))
    truth = torch.from_numpy(label)
    return _split(inputs, truth, truth, slice(0, train), slice(train, None), classes)


def _together(rng: np.random.Generator) -> Split:
    """Two modalities tell together what neither does alone.

    Four classes of two bits. Each modality shows the first, weakly; the second is whether a bit
    that ``left`` shows well equals one that ``right`` does, so that each alone tells nothing of
    it. The fused head needs a hidden layer.
    """
    size, width = 3000, 16
    known, left, right = rng.integers(2, size=(3, size))
    label = 2 * known + (left == right)
    inputs = {}
    for name, bit in (("left", left), ("right", right)):
        x = rng.standard_normal((size, width)).astype(np.float32)
        x[:, :4] += 2.0 * (2 * bit[:, None] - 1)
        x[:, 4:8] += 0.6 * (2 * known[:, None] - 1)
        inputs[name] = torch.from_numpy(x)
    truth = torch.from_numpy(label)
    split = _split(inputs, truth, truth, slice(0, 1000), slice(1000, None), 4)
    return replace(split, hidden=128)


def _rare(rng: np.random.Generator) -> Split:
    """Two classes that overlap, one of them a tenth of the training set and half of the test set.

    Its samples surprise all heads as wrong labels do, the more so until they are learnt.
    """
    size, train = 3000, 1000
    label = np.where(np.arange(size) < train, rng.random(size) < 0.1, rng.random(size) < 0.5)
    inputs = {}
    for name, width in (("first", 20), ("second", 12)):
        x = rng.standard_normal((size, width)).astype(np.float32) + 0.35 * label[:, None]
        inputs[name] = torch.from_numpy(x.astype(np.float32))
    truth = torch.from_numpy(label.astype(np.int64))
    return _split(inputs, truth, truth, slice(0, train), slice(train, None), 2)


def _question(rng: np.random.Generator) -> Split:
    """A question tells nothing by itself, and what the image tells depends on it.

    The image shows four attributes of four values each; the question asks for one of them, whose
    value is the class. Without the question, the image is right about four times in nine. The
    fused head needs a hidden layer.
    """
    size, attributes, values = 4000, 4, 4
    asked = rng.integers(attributes, size=size)
    shown = rng.integers(values, size=(size, attributes))
    label = shown[np.arange(size), asked]
    looks = rng.standard_normal((attributes, values, 64))
    words = rng.standard_normal((attributes, 32))
    image = sum(looks[a, shown[:, a]] for a in range(attributes))
    inputs = {"image": image, "question": words[asked]}
    noisy = {
        name: torch.from_numpy((x + 0.5 * rng.standard_normal(x.shape)).astype(np.float32))
        for name, x in inputs.items()
    }
    truth = torch.from_numpy(label)
    split = _split(noisy, truth, truth, slice(0, 2000), slice(2000, None), values)
    return replace(split, hidden=128)


def _reference(rng: np.random.Generator) -> Split:
    """A signal under noise three times as strong, and that noise alone, seen through mixtures."""
    size, classes, width = 4000, 5, 16
    label = rng.integers(classes, size=size)
    signal = rng.standard_normal((classes, width))[label]
    noise = 3.0 * rng.standard_normal((size, width))
    inputs = {}
    for name, x, wide in (("signal", signal + noise, 48), ("reference", noise, 40)):
        mixed = x @ rng.standard_normal((width, wide)) / np.sqrt(width)
        mixed += 0.1 * rng.standard_normal(mixed.shape)
        inputs[name] = torch.from_numpy(mixed.astype(np.float32))
    truth = torch.from_numpy(label)
    return _split(inputs, truth, truth, slice(0, 2000), slice(2000, None), classes)


def _common(rng: np.random.Generator) -> Split:
    """What varies within a class is the same in all modalities, which together can take it off.

    Three modalities see the class of twenty in full, by half and not at all, and all see what the
    sample has in common, each through a saturating mixture of its own.
    """
    size, classes, width = 3000, 20, 8
    label = rng.integers(classes, size=size)
    kind = 1.5 * rng.standard_normal((classes, width))[label]
    shared = rng.standard_normal((size, width))
    inputs = {}
    for name, strength in (("strong", 1.0), ("weak", 0.5), ("none", 0.0)):
        mixed = (strength * kind + shared) @ rng.standard_normal((width, 64)) / np.sqrt(width)
        x = np.tanh(mixed) + 0.3 * rng.standard_normal(mixed.shape)
        inputs[name] = torch.from_numpy(x.astype(np.float32))
    truth = torch.from_numpy(label)
    return _split(inputs, truth, truth, slice(0, 1000), slice(1000, None), classes)


def _drawn(rng: np.random.Generator) -> Split:
    """A task of its own for each seed; see ``drawn.draw``."""
    inputs, label, classes, hidden = draw(rng)
    arrays = {name: torch.from_numpy(x) for name, x in inputs.items()}
    truth, border = torch.from_numpy(label), len(label) - TEST
    split = _split(arrays, truth, truth, slice(0, border), slice(border, None), classes)
    return replace(split, hidden=hidden)


def _diabetes(rng: np.random.Generator) -> Split:
    """Disease progression from body measures and blood serum: a regression over bins.

    The toolkit takes class probabilities, so the target is a soft histogram: normal
    around the value, over 20 bins; the prediction is the expected centre.
    """
    from sklearn.datasets import load_diabetes  # the extra "study"

    source = load_diabetes()
    x, value = torch.from_numpy(source.data).float(), torch.from_numpy(source.target).float()
    inputs = {"body": x[:, :4], "serum": x[:, 4:]}
    edges = torch.linspace(0.0, 360.0, 21)
    width = float(edges[1])
    below = torch.special.ndtr((edges - value.unsqueeze(1)) / width)
    truth = below.diff(dim=1)
    truth = truth / truth.sum(dim=1, keepdim=True)
    order = torch.from_numpy(rng.permutation(len(value)))
    split = _split(inputs, truth, value, order[:300], order[300:], 20)
    return replace(split, centres=(edges[1:] + edges[:-1]) / 2)


def _digits(rng: np.random.Generator, spoken: Path) -> Split:
    """Spoken digits of unseen speakers with handwritten ones of the same class.

    Three speakers to train, three to test, 1,000 recordings of each group; images from
    disjoint halves of scikit-learn's digits, with noise.
    """
    from sklearn.datasets import load_digits  # the extra "study"

    mels, label, speaker = _spoken(spoken)
    images, image_label = load_digits(return_X_y=True)
    speakers = rng.permutation(np.unique(speaker))
    halves = np.array_split(rng.permutation(len(images)), 2)
    parts = []
    for group, half in zip(np.array_split(speakers, 2), halves, strict=True):
        heard = rng.permutation(np.flatnonzero(np.isin(speaker, group)))[:1000]
        seen = np.empty(len(heard), dtype=np.int64)
        for digit in range(10):
            where = label[heard] == digit
            seen[where] = rng.choice(half[image_label[half] == digit], where.sum())
        image = (images[seen] - 4.9) / 6.0 + 1.6 * rng.standard_normal((len(seen), 64))
        parts.append((mels[heard], torch.from_numpy(image).float(), torch.from_numpy(label[heard])))
    (audio, image, truth), (test_audio, test_image, test_truth) = parts
    return Split(
        {"audio": audio, "image": image},
        truth,
        truth,
        {"audio": test_audio, "image": test_image},
        test_truth,
        10,
    )


@lru_cache(maxsize=1)
def _spoken(path: Path) -> tuple[Tensor, NDArray[np.int64], NDArray[np.str_]]:
    """Log-mel spectrograms ``[N, 40, 32]`` of the first 0.8 seconds, labels, speakers."""
    with np.load(path) as archive:
        arrays = dict(archive)
    ends = np.cumsum(arrays["length"])
    clips = np.split(arrays["audio"].astype(np.float32) / 2**15, ends[:-1])
    waves = torch.stack(
        [F.pad(torch.from_numpy(x[:6400]), (0, 6400 - len(x[:6400]))) for x in clips]
    )
    window = torch.hann_window(256)
    power = torch.stft(waves, 256, 200, window=window, return_complex=True).abs().square()
    mels = (_mel_filters(40, 129, 4000.0) @ power + 1e-6).log()[:, :, :32]
    return mels, arrays["label"].astype(np.int64), arrays["speaker"]


def _mel_filters(count: int, bins: int, highest: float) -> Tensor:
    """Triangles evenly spaced on the mel scale, ``[count, bins]``."""
    mel = np.linspace(2595 * np.log10(1 + 60 / 700), 2595 * np.log10(1 + highest / 700), count + 2)
    corner = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.linspace(0, highest, bins)
    low, middle, high = (corner[i : i + count, None] for i in range(3))
    rise, fall = (frequency - low) / (middle - low), (high - frequency) / (high - middle)
    return torch.from_numpy(np.clip(np.minimum(rise, fall), 0, None)).float()
