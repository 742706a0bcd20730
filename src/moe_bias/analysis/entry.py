"""One adapter's entry of `analysis.json`, all of it: `record` says what it holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_bias.analysis.flips import answer_record, text_flips
from moe_bias.analysis.matter import Matter, Options
from moe_bias.analysis.record import adapter_record, checkpoint_record
from moe_bias.analysis.survey import Marks, overlap, survey
from moe_bias.layer import MoEBiasLayer
from moe_bias.training.checkpoint import saved_layers


def adapter_entry(
    matter: Matter, marks: Marks, layer: MoEBiasLayer, name: str, options: Options, run: Path | None = None
) -> dict[str, Any]:
    """What the layer, in evaluation mode, does; with a series along its `run`, a folder with checkpoints."""
    found = survey(layer, matter.base.head, matter.text, marks, options.flips, options.contexts, name)
    shared = overlap(matter.text, marks, found.adapted_entropy)
    series = [] if run is None else list(_checkpoints(matter, marks, layer, run))
    ground = matter.ground
    return {
        **adapter_record(name, layer, found, shared, series, options.top, matter.decode),
        "flips": text_flips(matter, layer, found.flips.moments, options),
        "answers": None if ground is None else answer_record(matter, ground, layer, marks, options),
    }


def text_record(matter: Matter, marks: Marks) -> dict[str, Any]:
    """What is said of the text."""
    return {
        "kind": matter.kind,
        "name": matter.name,
        "tokens": len(marks.entropy),
        "examples": marks.examples,
        "dropped": matter.dropped,
        "rho": marks.rho,
        "threshold": marks.threshold,
    }


def _checkpoints(matter: Matter, marks: Marks, layer: MoEBiasLayer, run: Path) -> Iterator[dict[str, Any]]:
    """Overlap and KL at each checkpoint of the run that made the adapter, where they are beside it."""
    earlier = copy.deepcopy(layer)
    for step, tensors in saved_layers(run):
        earlier.load_state_dict(tensors)
        found = survey(earlier, matter.base.head, matter.text, marks, 0, 0, f"step {step}")
        yield checkpoint_record(step, found, overlap(matter.text, marks, found.adapted_entropy))
