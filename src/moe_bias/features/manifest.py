"""The manifest of a feature store: what it was made from and how, and a checksum for each shard.

A store is a folder of `shard-00000.safetensors`, ... and one `manifest.json`. While it is being made
the manifest is called `unfinished.json` and lists the shards that are whole; renaming it is the last
step, so a folder with a `manifest.json` is complete. No time is in it: a run that was killed
and continued ends with the same bytes as one that was not. What making it took is in `seconds.json`.

A manifest that contradicts itself is refused by the field, and any other change by its own checksum: training
would follow it without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_bias.config import check_support
from moe_bias.features.fingerprint import Count, ModelFacts, Size
from moe_bias.mistakes import UserError, first_mistake, read_json

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
SECONDS = "seconds.json"
TEMPERATURE = 1.0
"""Logits in a store are of the base distribution itself."""
INFORMATIVE = frozenset({"name", "revision", "source"})
"""Fields that tell a reader where something came from; what must fit is in the hashes beside them."""


_SCALAR_BYTES = 3 * 8 + 2 * 4 + 3 * 8
"""Bytes a token of all but its hidden state, at least: three int64, two float32, three float64."""
_CHECKSUM = "checksum"
_RESTORE = "restore it from a copy, or remove the folder and extract again"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Recipe(_Part):
    """All that decides the bytes of a store, known before the model runs.

    `part` i of n holds every n-th example from the i-th; `corpus` hashes the examples of all parts.
    `support` is how it was asked for: 'auto:M', or the hash of given ids. `held_out` is the hash of the
    rows that had no say in what was chosen; None where all had, or nothing was chosen. A shard is closed
    once it has `shard_tokens` completion tokens, before any are dropped; `batch_size` examples went through
    the backbone together, which decides how sums are rounded.
    """

    model: ModelFacts
    source: str
    corpus: str
    examples: Size
    part: tuple[Size, Size]
    hidden_dtype: Literal["float32", "bfloat16", "float16"]
    temperature: Annotated[float, Field(gt=0)] = TEMPERATURE
    support: str
    held_out: str | None = None
    keep_top: Annotated[float, Field(gt=0, le=1)] | None
    shard_tokens: Size
    batch_size: Size

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.part[0] > self.part[1]:
            raise ValueError(f"part {self.part[0]} of {self.part[1]} cannot be")
        return self

    @property
    def token_bytes(self) -> int:
        """What a token takes, its share of headers left out."""
        dtype: torch.dtype = getattr(torch, self.hidden_dtype)
        return self.model.hidden_size * dtype.itemsize + _SCALAR_BYTES


class Shard(_Part):
    """One file: tokens that it holds, tokens that `keep_top` dropped from it, size in bytes, SHA-256."""

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,8}\.safetensors$")]
    tokens: Count
    dropped: Count
    bytes: Count
    sha256: Digest


class Manifest(_Part):
    """What is in a store. `support` lists token ids, or is None for the whole vocabulary.

    `threshold`, in nats, is the base entropy that a token had to reach to be kept; None where all
    were kept. `num_shards` counts those that the finished store has.
    """

    format: Literal["moe-bias features 1"] = "moe-bias features 1"
    recipe: Recipe
    support: list[int] | None
    threshold: float | None
    num_shards: Annotated[int, Field(ge=1, le=10**8)]
    versions: dict[str, str]
    shards: list[Shard] = []

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        self._check_support()
        if (self.threshold is None) != (self.recipe.keep_top is None):
            raise ValueError(f"threshold {self.threshold} does not go with keep_top {self.recipe.keep_top}")
        numbers = [shard_number(shard.file) for shard in self.shards]
        named = [shard.file for shard in self.shards] == [shard_file(number) for number in numbers]
        if not named or sorted(set(numbers)) != numbers or (numbers and numbers[-1] >= self.num_shards):
            raise ValueError(f"its shards are not {self.num_shards} different ones in their order")
        for shard in self.shards:
            if shard.bytes < shard.tokens * self.recipe.token_bytes:
                raise ValueError(f"{shard.file} cannot hold {shard.tokens} tokens in {shard.bytes} bytes")
            if shard.dropped and self.threshold is None:
                raise ValueError(f"{shard.file} cannot have dropped {shard.dropped} tokens without a threshold")
        return self

    def _check_support(self) -> None:
        """Against the vocabulary, and against how the support was asked for."""
        ids, asked = self.support_ids(), self.recipe.support
        if self.support is not None:
            check_support(ids)
            if max(ids) >= self.recipe.model.vocab_size:
                raise ValueError(
                    f"support id {max(ids)} is outside the vocabulary of {self.recipe.model.vocab_size} tokens"
                )
        if asked.startswith("auto:"):
            fits = asked == f"auto:{len(ids)}" and ids == sorted(ids)
        else:
            fits = asked == ids_hash(ids)
        if not fits:
            raise ValueError(f"support has {len(ids)} ids, which are not the {shown(asked)} that was asked for")

    @property
    def tokens(self) -> int:
        """Tokens in the shards listed."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def dropped(self) -> int:
        """Tokens of those shards' examples whose entropy was below the threshold."""
        return sum(shard.dropped for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the shards listed."""
        return sum(shard.bytes for shard in self.shards)

    def support_ids(self) -> list[int]:
        """The support as ids, the whole vocabulary written out."""
        return list(range(self.recipe.model.vocab_size)) if self.support is None else self.support


def ids_hash(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, or numbers of rows, in their order."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()


def recipe_hash(recipe: Recipe, versions: Mapping[str, str]) -> str:
    """SHA-256 of all in a recipe that must fit, and of the versions that it is followed with."""
    content = [_fitting(recipe), dict(versions)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_file(number: int) -> str:
    """The name of a store's shard, from 0."""
    return f"shard-{number:05d}.safetensors"


def shard_number(file: str) -> int:
    """The number of the shard that has this name."""
    return int(file.removeprefix("shard-").removesuffix(".safetensors"))


def seconds_spent(folder: Path) -> float:
    """Seconds that making the store took, a run that was killed up to its last whole shard; 0 where unknown.

    Raises UserError where the file that tells it is damaged.
    """
    path = folder / SECONDS
    if not path.is_file():
        return 0.0
    content = read_json(path, "file")
    seconds = content.get("seconds") if isinstance(content, dict) else None
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise UserError(
            f"{str(path)!r} does not tell how many seconds making the store took; remove it, nothing else needs it"
        )
    return float(seconds)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete store.

    Raises UserError where the folder holds none, an unfinished one, or one that cannot be read or be right.
    """
    if (folder / MANIFEST).is_file():
        return load_manifest(folder / MANIFEST)
    if (folder / UNFINISHED).is_file():
        begun = load_manifest(folder / UNFINISHED)
        raise UserError(
            f"the feature store in {str(folder)!r} is unfinished, {len(begun.shards)} of {begun.num_shards} shards "
            "are whole; make it again as it was begun, which continues there"
        )
    raise UserError(f"{str(folder)!r} holds no feature store: it has no {MANIFEST}")


def load_manifest(path: Path) -> Manifest:
    """Raises UserError where the file is no manifest of this format, naming the field, or is not as it was written."""
    content = read_json(path, "manifest")
    checksum = content.pop(_CHECKSUM, None) if isinstance(content, dict) else None
    try:
        manifest = Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise UserError(f"{str(path)!r} is not a manifest that can be read: {_first(error)}; {_RESTORE}") from error
    if path.name == MANIFEST and len(manifest.shards) < manifest.num_shards:
        raise UserError(
            f"{str(path)!r} lists {len(manifest.shards)} of the {manifest.num_shards} shards of its store; {_RESTORE}"
        )
    # Stores of before there was one have none.
    if checksum is not None and checksum != _digest(content):
        raise UserError(f"{str(path)!r} was changed after it was written: its checksum does not fit; {_RESTORE}")
    return manifest


def sealed(manifest: Manifest) -> dict[str, Any]:
    """A manifest as its file holds it: with a checksum of all else."""
    content = manifest.model_dump(mode="json")
    return content | {_CHECKSUM: _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, with the field that it is wrong in."""
    first = first_mistake(error)
    return f"{first.field[:80]}: {first.reason}" if first.field else first.reason


def other_store(folder: Path, manifest: Manifest, wrong: tuple[str, str, str]) -> UserError:
    """The error to raise where a folder holds a store that differs from what is wanted in this."""
    name, theirs, ours = wrong
    what = f"its {name} is {theirs}, here it is {ours}"
    if name == "corpus":  # hashes, which say nothing to a reader
        what = f"it is of other examples, or of these cut elsewhere, from {shown(manifest.recipe.source)}"
    return UserError(f"{str(folder)!r} holds another feature store: {what}; name another folder or remove it")


def first_difference(
    ours: BaseModel, theirs: BaseModel, apart_from: frozenset[str] = frozenset()
) -> tuple[str, str, str] | None:
    """Dotted name and both values of the first field that differs, or None.

    Fields named in `apart_from`, and informative ones, may differ.
    """
    left, right = _fitting(ours), _fitting(theirs)
    for name, value in left.items():
        if name.rpartition(".")[2] not in apart_from and right[name] != value:
            return name, shown(value), shown(right[name])
    return None


def shown(value: object) -> str:
    """A value as an error names it: hashes and lists cut short."""
    text = str(value) if isinstance(value, float) else repr(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _fitting(model: BaseModel) -> dict[str, Any]:
    """Every field by its dotted name, without the informative ones."""
    flat = _flat(model.model_dump())
    return {name: value for name, value in flat.items() if name.rpartition(".")[2] not in INFORMATIVE}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
