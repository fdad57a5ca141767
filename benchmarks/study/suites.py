"""Which runs make a suite, and which settings they take."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .conditions import CONDITIONS
from .config import Config
from .data import EPOCHS, family
from .methods import CEILING, METHODS, peers

# Settings are chosen on the first; the headline is on the others, with other seeds.
TUNING_DATA = ("uci:kar+fou", "uci:fou+zer+mor")
TUNING_CONDITIONS = ("clean", "symmetric-40")
TUNING_SEEDS = range(100, 110)
PAIR, TRIPLE, ALL = "uci:fou+mor", "uci:fac+zer+mor", "uci:fou+fac+kar+pix+zer+mor"
OTHERS = ("uci:pix+zer", "uci:fac+fou+zer")

PEERS = tuple(peers())
ABLATIONS = ("uniform", *(name for name in METHODS if name.startswith("dyncim")))
# What is for tasks where heads learn by heart what little modalities tell.
FUSED_WITNESS = "dyncim/no-fused-witness"
BY_HEART = (
    "dyncim/no-generalisation",
    "dyncim/logits-throughout",
    "dyncim/whole-logits",
    FUSED_WITNESS,
)
NOISY = ("symmetric-40", "asymmetric-30")
RARER = tuple(name for name in CONDITIONS if name not in ("clean", *NOISY))
SETTINGS = "settings.csv"


@dataclass(frozen=True)
class Block:
    """A grid of runs."""

    data: tuple[str, ...]
    conditions: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: range
    epochs: int | None = None  # the data's own

    def configs(self, settings: Mapping[str, Sequence[float]]) -> Iterator[Config]:
        """Seed by seed, so that a part of the grid is a fair part."""
        for seed in self.seeds:
            for data in self.data:
                epochs = self.epochs or EPOCHS[family(data)]
                for condition in self.conditions:
                    for method in self.methods:
                        for setting in settings[method]:
                            yield Config(data, condition, method, setting, seed, epochs)


SUITES: dict[str, tuple[Block, ...]] = {
    "smoke": (
        Block(
            ("uci:fou+zer+mor",),
            ("clean", "symmetric-40"),
            ("single", "uniform", "ogm_ge", "mmpareto", "gce", "dyncim"),
            range(2),
            epochs=6,
        ),
        Block(("starving", "diabetes"), ("clean",), ("single", "uniform", "dyncim"), range(2), 4),
    ),
    "tuning": (Block(TUNING_DATA, TUNING_CONDITIONS, PEERS, TUNING_SEEDS),),
    "headline": (
        Block((PAIR, TRIPLE), ("clean", *NOISY), PEERS, range(10)),
        Block(("starving", "together", "diabetes"), ("clean",), PEERS, range(10)),
        Block(("starving", "together"), ("symmetric-40",), PEERS, range(10)),
        Block((TRIPLE,), ("clean",), (CEILING,), range(10)),
    ),
    "breadth": (
        Block((*OTHERS, ALL), ("clean", "symmetric-40"), PEERS, range(10)),
        Block((TRIPLE,), RARER, PEERS, range(10)),
        Block((TRIPLE,), ("imbalanced-20",), ("dyncim/no-prior",), range(10)),
        Block(("diabetes",), ("symmetric-40",), PEERS, range(10)),
        Block((OTHERS[1], ALL), ("clean",), (CEILING,), range(10)),
        Block(("dominated", "overlap"), ("clean", "symmetric-20"), PEERS, range(10)),
        Block(("rare",), ("clean",), PEERS, range(10)),
        Block(("question", "reference", "common"), ("clean", "symmetric-20"), PEERS, range(10)),
        Block(("common",), ("clean",), BY_HEART, range(10)),
        Block(("odd:fac+zer+mor",), ("clean", *NOISY), PEERS, range(10)),
    ),
    "drawn": (Block(("drawn",), ("clean",), (*PEERS, *BY_HEART), range(30)),),
    "digits": (Block(("digits",), ("clean", "symmetric-40"), PEERS, range(10)),),
    "ablation": (
        Block((PAIR, TRIPLE, "starving"), ("clean", "symmetric-40"), ABLATIONS, range(5)),
        Block((TRIPLE,), ("asymmetric-30",), ABLATIONS, range(5)),
        Block(("together",), ("symmetric-40",), (FUSED_WITNESS,), range(10)),
        Block(("together", "diabetes", "dominated"), ("clean",), ABLATIONS, range(5)),
    ),
}


def configs(suite: str, settings: Path) -> list[Config]:
    """The runs of a suite: in ``tuning`` every value of every grid, elsewhere the chosen one."""
    values: dict[str, Sequence[float]]
    if suite == "tuning":
        values = {name: METHODS[name].grid for name in PEERS}
    else:
        values = {name: (value,) for name, value in chosen(settings).items()}
    found = (config for block in SUITES[suite] for config in block.configs(values))
    return list(dict.fromkeys(found))


def chosen(settings: Path) -> dict[str, float]:
    """Each method's setting: the one that ``choose`` wrote, else the middle of its grid.

    An ablation ``NAME/part`` has that of ``NAME``.
    """
    values = {name: METHODS[name].grid[len(METHODS[name].grid) // 2] for name in PEERS}
    if settings.exists():
        with settings.open(newline="") as file:
            rows = list(csv.DictReader(file))
        values |= {row["method"]: float(row["value"]) for row in rows if row["chosen"] == "yes"}
    return {name: values[name.partition("/")[0]] for name in METHODS}


def select(
    found: Iterable[Config],
    data: Sequence[str] | None,
    methods: Sequence[str] | None,
    conditions: Sequence[str] | None,
    seeds: range | None,
) -> list[Config]:
    """The runs that pass every filter given."""
    return [
        config
        for config in found
        if (data is None or config.data in data)
        and (methods is None or config.method in methods)
        and (conditions is None or config.condition in conditions)
        and (seeds is None or config.seed in seeds)
    ]
