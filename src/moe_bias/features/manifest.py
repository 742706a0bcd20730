"""The manifest of a feature store: what it was made from and how, and a checksum for each shard.

A store is a folder of `shard-00000.safetensors`, ... and one `manifest.json`. While it is being made
the manifest is called `unfinished.json` and lists the shards that are whole; renaming it is the last
step, so a folder with a `manifest.json` is complete. No time is in it: a run that was killed
and continued ends with the same bytes as one that was not. What making it took is in `seconds.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_bias.config import UserError
from moe_bias.features.fingerprint import ModelFacts

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
SECONDS = "seconds.json"
TEMPERATURE = 1.0
"""Logits in a store are of the base distribution itself."""
INFORMATIVE = frozenset({"name", "revision", "source"})
"""Fields that tell a reader where something came from; what must fit is in the hashes beside them."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    examples: int
    part: tuple[int, int]
    hidden_dtype: Literal["float32", "bfloat16", "float16"]
    temperature: float = TEMPERATURE
    support: str
    held_out: str | None = None
    keep_top: float | None
    shard_tokens: int
    batch_size: int


class Shard(_Part):
    """One file: tokens that it holds, tokens that `keep_top` dropped from it, size in bytes, SHA-256."""

    file: Annotated[str, Field(pattern=r"^shard-\d{5}\.safetensors$")]
    tokens: int
    dropped: int
    bytes: int
    sha256: str


class Manifest(_Part):
    """What is in a store. `support` lists token ids, or is None for the whole vocabulary.

    `threshold`, in nats, is the base entropy that a token had to reach to be kept; None where all
    were kept. `num_shards` counts those that the finished store has.
    """

    format: Literal["moe-bias features 1"] = "moe-bias features 1"
    recipe: Recipe
    support: list[int] | None
    threshold: float | None
    num_shards: int
    versions: dict[str, str]
    shards: list[Shard] = []

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


def seconds_spent(folder: Path) -> float:
    """Seconds that making the store took, a run that was killed up to its last whole shard; 0 where unknown."""
    path = folder / SECONDS
    return float(json.loads(path.read_bytes())["seconds"]) if path.is_file() else 0.0


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete store.

    Raises UserError where the folder holds none, an unfinished one, or one that cannot be read.
    """
    if (folder / MANIFEST).is_file():
        return load_manifest(folder / MANIFEST)
    if (folder / UNFINISHED).is_file():
        begun = load_manifest(folder / UNFINISHED)
        raise UserError(
            f"the feature store in {str(folder)!r} is unfinished, {len(begun.shards)} of {begun.num_shards} shards "
            "are whole; run the command that began it again to continue"
        )
    raise UserError(f"{str(folder)!r} holds no feature store: it has no {MANIFEST}")


def load_manifest(path: Path) -> Manifest:
    """Raises UserError where the file is no manifest of this format, naming the field."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "content"
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{str(path)!r} is not a manifest that can be read: {field}: {reason}") from error


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
