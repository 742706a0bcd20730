"""Hidden states to train on, and those of other examples of the same texts to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from weakref import finalize

import numpy as np

from moe_bias.config import OWN_SUPPORT
from moe_bias.evaluation.statistics import Floats
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import Frozen
from moe_bias.tasks.conversations import Corpus, Example
from moe_bias.training.sft import Prepared, prepare_stored


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Hidden states of the answers in a feature store, those of some examples held out to measure on.

    `held_out` are rows of the source. `always` are ids that a chosen support must hold, `made_on` is the support that
    the store was asked for. `corpus` are the texts, None where there is only the store; `held_out_units` the unit of
    each row that is held out, None where each row is one. Of `pairs` examples stand two by two: chosen, then rejected.
    """

    base: Frozen
    store: FeatureStore
    held_out: list[int]
    always: list[int]
    made_on: str = OWN_SUPPORT
    corpus: Corpus | None = None
    held_out_units: Sequence[int] | None = None
    pairs: bool = False
    _folder: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        finalize(self, self._folder.close)

    def __repr__(self) -> str:
        tokens = f"{len(self.store):,} tokens of {len(self.store.example.unique()):,} examples"
        return f"Data({tokens}, {len(self.held_out):,} of them held out, support {len(self.store.support):,})"

    @cached_property
    def prepared(self) -> Prepared:
        """Both parts on the support that the store was made on."""
        return self.on(self.made_on)

    def on(self, support: str | Sequence[int]) -> Prepared:
        """Both parts on a support, by its ids or as `SFTConfig.support` names it. Raises UserError on a bad one."""
        wanted = OWN_SUPPORT if support == self.made_on else support
        return prepare_stored(self.store, self.base.head, self.held_out, wanted, self.always)

    def by_unit(self, sums: Floats) -> Floats:
        """Sums over held-out rows as sums over held-out units: those of one unit are not independent."""
        if self.held_out_units is None:
            return sums
        number = np.unique(self.held_out_units, return_inverse=True)[1]
        return np.bincount(number, weights=sums).astype(np.float64)

    def examples(self) -> tuple[list[Example], list[Example]]:
        """Training and held-out examples."""
        assert self.corpus is not None
        train: list[Example] = []
        held_out: list[Example] = []
        excluded = set(self.held_out)
        for row, example in zip(self.corpus.rows, self.corpus.examples, strict=True):
            (held_out if row in excluded else train).append(example)
        return train, held_out

    def close(self) -> None:
        """Removes hidden states that are not to be kept; they are removed with the last reference, too."""
        self._folder.close()
