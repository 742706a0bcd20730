"""Reading a feature store: hidden states and scalars of a whole corpus, from disk as they are needed.

    store = FeatureStore.open("part-1", "part-2")
    store.check(model_facts(model, head, tokenizer))
    batch = store.at(torch.randint(len(store), (512,)))

Opening a store compares the checksums of its shards, those apart that were found whole before and have not
changed since (see `checked`). From then on they are mapped into memory, not read: `at` touches the
rows that it is asked for, and a slice within one shard copies no hidden state. The small columns (all but
the hidden states, about 60 bytes a token) are joined in memory the first time they are asked for.

Shapes: T tokens, D hidden, M support.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_bias.features.checked import damaged
from moe_bias.features.extract import Features, support_columns
from moe_bias.features.fingerprint import ModelFacts
from moe_bias.features.manifest import Manifest, Recipe, Shard, first_difference, read_manifest, seconds_spent, shown
from moe_bias.mistakes import UserError
from moe_bias.support import RestScalars

HIDDEN = "hidden"
SMALL_COLUMNS = (
    "token",
    "example",
    "position",
    "logit",
    "entropy",
    "log_partition",
    "rest_log_sum_exp",
    "rest_mean_logit",
)
"""Columns of a shard beside the hidden states, each (T,)."""
_OF_A_PART = frozenset({"part", "shard_tokens", "batch_size", "support"})
"""Fields of a recipe in which parts of one corpus may differ; of the support it is the ids that must agree."""
_SCALAR_TYPES = dict(zip(SMALL_COLUMNS, 3 * [torch.int64] + 2 * [torch.float32] + 3 * [torch.float64], strict=True))
_FINITE = ("logit", "entropy", "log_partition")
_NAMED = 5
"""Damaged shards that a refusal names."""
REPAIR = "make the store again as it was made, which makes damaged and missing shards anew, and those alone"


@dataclass(frozen=True)
class _MappedShard:
    """One shard file; its tensors lie in the file's pages."""

    folder: Path
    entry: Shard
    recipe: Recipe

    @property
    def path(self) -> Path:
        return self.folder / self.entry.file

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Raises UserError where the file is missing, cut short or not what the manifest says."""
        try:
            if not self.path.is_file():
                raise FileNotFoundError("there is no such file")
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"shard {str(self.path)!r} cannot be read ({error}); {REPAIR}") from error
        self._check_columns(tensors)
        self._check_values(tensors)
        return tensors

    def _check_columns(self, tensors: Mapping[str, Tensor]) -> None:
        hidden = getattr(torch, self.recipe.hidden_dtype), (self.entry.tokens, self.recipe.model.hidden_size)
        expected = {name: (dtype, (self.entry.tokens,)) for name, dtype in _SCALAR_TYPES.items()} | {HIDDEN: hidden}
        for name in sorted({*expected, *tensors}):
            found = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else None
            if found != expected.get(name):
                raise UserError(
                    f"shard {str(self.path)!r} has column {name!r} as {_described(found)}, its manifest "
                    f"says {_described(expected.get(name))}; {REPAIR}"
                )

    def _check_values(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.entry.tokens:
            return
        bounds = {"token": self.recipe.model.vocab_size, "example": 2**62, "position": 2**62}
        for name, bound in bounds.items():
            low, high = (int(value) for value in tensors[name].aminmax())
            if low < 0 or high >= bound:
                outside = low if low < 0 else high
                raise UserError(f"shard {str(self.path)!r} has {name} {outside}, outside 0 to {bound - 1}; {REPAIR}")
        for name in _FINITE:
            if not torch.isfinite(tensors[name]).all():
                raise UserError(
                    f"shard {str(self.path)!r} has NaN or infinite values in its column {name!r}: the model overflowed "
                    "when they were extracted; extract again in a wider type, with `dtype` float32"
                )


def _described(column: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "none" if column is None else f"{str(column[0]).removeprefix('torch.')} {list(column[1])}"


class FeatureStore:
    """The features of a corpus, from one folder or from several that hold parts of it."""

    def __init__(self, folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
        """Use `open`, which checks that the parts belong together."""
        self.folders = tuple(folders)
        self.manifests = tuple(manifests)
        self._shards = [
            _MappedShard(folder, entry, manifest.recipe)
            for folder, manifest in zip(folders, manifests, strict=True)
            for entry in manifest.shards
        ]
        self._ends = torch.tensor([shard.entry.tokens for shard in self._shards]).cumsum(0)
        self._columns: dict[str, Tensor] = {}

    @classmethod
    def open(cls, *folders: str | Path, anew: bool = False) -> FeatureStore:
        """The store in these folders, in the order of their parts, its shards compared with their checksums.

        Shards that were found whole before and have not changed since are read for that only if `anew`.
        Raises UserError where a folder holds no complete store, where two were not made alike
        (naming the field), where a part of the corpus is listed twice, and on damaged shards by name.
        """
        if not folders:
            raise UserError("no folder of a feature store is given")
        read = [(Path(folder), read_manifest(Path(folder))) for folder in folders]
        read.sort(key=lambda pair: pair[1].recipe.part)
        for (folder, manifest), (other_folder, other) in pairwise(read):
            _check_parts(folder, manifest, other_folder, other)
        store = cls([folder for folder, _ in read], [manifest for _, manifest in read])
        store.verify(anew=anew)
        return store

    def __len__(self) -> int:
        return sum(shard.entry.tokens for shard in self._shards)

    @property
    def manifest(self) -> Manifest:
        """Of the first part; parts agree in all that matters to a reader."""
        return self.manifests[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.manifest.recipe.model.hidden_size

    @property
    def dropped(self) -> int:
        """Tokens that `keep_top` left out."""
        return sum(manifest.dropped for manifest in self.manifests)

    @property
    def seconds(self) -> float:
        """What making the store took; 0 where that is not known."""
        return sum(seconds_spent(folder) for folder in self.folders)

    @cached_property
    def support(self) -> Tensor:
        """Token ids (M,) int64."""
        return torch.tensor(self.manifest.support_ids())

    @property
    def token(self) -> Tensor:
        """Realised token ids (T,) int64."""
        return self.small_column("token")

    @property
    def example(self) -> Tensor:
        """(T,) int64: the row of the source, from 0, that each token is of."""
        return self.small_column("example")

    @property
    def position(self) -> Tensor:
        """(T,) int64: each token's place in its completion, from 0."""
        return self.small_column("position")

    @property
    def entropy(self) -> Tensor:
        """Base entropies (T,) float32 in nats."""
        return self.small_column("entropy")

    def small_column(self, name: str) -> Tensor:
        """One of SMALL_COLUMNS over all shards, (T,); kept in memory from then on."""
        if name not in self._columns:
            self._columns[name] = torch.cat([shard.tensors[name] for shard in self._shards])
        return self._columns[name]

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens: ids (T,) int64, a mask (T,) bool or a slice of step 1. Reads only their rows.

        Raises IndexError on an id outside the store.
        """
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero().squeeze(-1)
        return self._features(self._hidden_of(index), {name: self.small_column(name)[index] for name in SMALL_COLUMNS})

    def parts(self) -> Iterator[Features]:
        """All tokens in order, a shard at a time, whole examples in each: nothing of them is kept in memory."""
        for shard in self._shards:
            tensors = _MappedShard(shard.folder, shard.entry, shard.recipe).tensors
            yield self._features(tensors[HIDDEN], tensors)

    def _features(self, hidden_TD: Tensor, small: Mapping[str, Tensor]) -> Features:
        return Features(
            hidden=hidden_TD,
            token=small["token"],
            example=small["example"],
            position=small["position"],
            logit=small["logit"],
            entropy=small["entropy"],
            log_partition=small["log_partition"],
            rest=RestScalars(small["rest_log_sum_exp"], small["rest_mean_logit"]),
            column=self._column_of_token[small["token"]],
            support=self.support,
        )

    def contents(self) -> Iterator[Tensor]:
        """The checksums of the shards."""
        for shard in self._shards:
            yield torch.tensor(list(bytes.fromhex(shard.entry.sha256)), dtype=torch.uint8)

    def check(
        self, facts: ModelFacts, *, support: Sequence[int] | None = None, temperature: float | None = None
    ) -> None:
        """Raises UserError naming the first field in which the store does not fit.

        `support` and `temperature` are compared where they are given.
        """
        recipe = self.manifest.recipe
        wrong = first_difference(recipe.model, facts, frozenset({"compute_dtype"}))
        if wrong is None and temperature not in (None, recipe.temperature):
            wrong = "temperature", str(recipe.temperature), str(temperature)
        if wrong is None and support is not None and list(support) != self.manifest.support_ids():
            wrong = "support", shown(self.manifest.support_ids()), shown(list(support))
        if wrong is not None:
            name, stored, wanted = wrong
            raise UserError(
                f"the feature store in {str(self.folders[0])!r}, made with model {recipe.model.name!r}, does not fit: "
                f"its {name} is {stored}, here it is {wanted}; extract again or name the model it was made with"
            )

    def verify(self, *, anew: bool = True) -> None:
        """Reads every shard and compares its checksum; if not `anew`, only what was not found whole before.

        Raises UserError naming the damaged shards.
        """
        wrong = [
            folder / shard.file
            for folder, manifest in zip(self.folders, self.manifests, strict=True)
            for shard in damaged(folder, manifest.shards, anew=anew)
        ]
        if wrong:
            names = ", ".join(repr(str(path)) for path in wrong[:_NAMED])
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise UserError(f"{len(wrong)} of {len(self._shards)} shards are damaged: {names}{more}; {REPAIR}")

    @cached_property
    def _column_of_token(self) -> Tensor:
        return support_columns(self.support, self.manifest.recipe.model.vocab_size)

    def _hidden_of(self, index: Tensor | slice) -> Tensor:
        if isinstance(index, slice):
            return self._hidden_slice(*index.indices(len(self)))
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"token ids from {index.min()} to {index.max()} in a store of {len(self)}")
        shard_T = torch.searchsorted(self._ends, index, right=True)
        hidden_TD = torch.empty(len(index), self.hidden_size, dtype=self._hidden_dtype)
        for number in shard_T.unique().tolist():
            rows = (shard_T == number).nonzero().squeeze(-1)
            within = index[rows] - self._start(number)
            hidden_TD[rows] = self._shards[number].tensors[HIDDEN].index_select(0, within)
        return hidden_TD

    def _hidden_slice(self, start: int, stop: int, step: int) -> Tensor:
        if step != 1:
            raise IndexError(f"a slice of step {step}; a feature store is sliced with step 1")
        parts = []
        for number, shard in enumerate(self._shards):
            first, last = self._start(number), int(self._ends[number])
            if max(start, first) < min(stop, last):
                parts.append(shard.tensors[HIDDEN][max(start, first) - first : min(stop, last) - first])
        if not parts:
            return torch.empty(0, self.hidden_size, dtype=self._hidden_dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self._shards[number].entry.tokens

    @property
    def _hidden_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.manifest.recipe.hidden_dtype)
        return dtype


def _check_parts(folder: Path, manifest: Manifest, other_folder: Path, other: Manifest) -> None:
    """Raises UserError where two stores are not different parts of one corpus, made alike."""
    names = f"{str(folder)!r} and {str(other_folder)!r}"
    wrong = first_difference(manifest.recipe, other.recipe, _OF_A_PART)
    for name in ("support", "threshold"):
        ours, theirs = getattr(manifest, name), getattr(other, name)
        if wrong is None and ours != theirs:
            wrong = name, shown(ours), shown(theirs)
    if wrong is not None:
        raise UserError(f"{names} are no parts of one store: {wrong[0]} is {wrong[1]} and {wrong[2]}")
    (number, total), (other_number, other_total) = manifest.recipe.part, other.recipe.part
    if total != other_total:
        raise UserError(f"{names} overlap: they are parts of {total} and of {other_total}")
    if number == other_number:
        raise UserError(f"{names} are the same part, {number} of {total}; list each part once")
