"""The frozen model, as a worker loads it: by its name, from the shared folder or the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_bias.config import BUNDLED_MODEL, Cluster
from moe_bias.features.fingerprint import ModelFacts, model_facts
from moe_bias.features.manifest import first_difference
from moe_bias.frozen import Frozen, cache_folder, load, resolve_model
from moe_bias.mistakes import UserError


@dataclass(frozen=True)
class NamedModel:
    """A model by the name that it was loaded by, and the fingerprint of the one here as JSON.

    `device` is what was asked for: workers are on GPUs, or all of them on CPUs (`loaded`).
    """

    name: str
    dtype: str
    device: str
    trust_remote_code: bool
    facts: str

    def loaded(self, on_gpu: bool) -> Frozen:
        """Raises UserError where it cannot be had on this machine, or is another one than where the work began."""
        base = load(self.name, "cuda" if on_gpu else "cpu", self.dtype, self.trust_remote_code)
        here, there = model_facts(base.model, base.head, base.tokenizer), ModelFacts.model_validate_json(self.facts)
        wrong = first_difference(here, there)
        if wrong is not None:
            raise UserError(f"model {self.name!r} is another one here: its {wrong[0]} is {wrong[1]}, not {wrong[2]}")
        return base


def named_model(base: Frozen, name: str = "", device: str = "", trust_remote_code: bool = False) -> NamedModel:
    """How workers load the same model; `name` and `device` are what it was loaded by, where that is known.

    Raises UserError on a model that was made in memory.
    """
    found = name or _own_name(base)
    if not found:
        raise UserError(
            "`base` is a model in memory without a name, which workers cannot load; save it in a folder that all "
            "nodes share, and load it from there"
        )
    return NamedModel(
        os.path.abspath(found) if os.path.exists(found) else found,
        str(base.model.dtype).removeprefix("torch."),
        device or ("cpu" if base.device.type == "cpu" and torch.cuda.is_available() else "auto"),
        trust_remote_code,
        model_facts(base.model, base.head, base.tokenizer).model_dump_json(),
    )


def model_of_workers(
    cluster: Cluster | None, base: Frozen, name: str = "", device: str = "", trust_remote_code: bool = False
) -> NamedModel | None:
    """The model that the workers of a cluster load; None where this process does the work. See `named_model`."""
    if cluster is None or cluster.is_this_process:
        return None
    return named_model(base, name, device, trust_remote_code)


def _own_name(base: Frozen) -> str:
    """The bundled model has that of its folder in this machine's cache, which other machines convert for themselves."""
    name = str(getattr(base.model, "name_or_path", ""))
    in_cache = name and Path(name).is_relative_to(cache_folder())
    return BUNDLED_MODEL if in_cache and name == resolve_model(BUNDLED_MODEL) else name
