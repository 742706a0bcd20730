"""Supervised training on hidden states: after one pass the backbone is not needed again.

`prepare` makes features and chooses the support, `prepare_stored` takes both from a feature store.
`fit` trains a layer on them in memory, `train` does so in a folder, with checkpoints. The loop itself
is in `trainer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from moe_bias.backbone import Head
from moe_bias.config import (
    LayerConfig,
    TrainingSettings,
    TrainSFTSettings,
    UserError,
    check_support,
)
from moe_bias.features.extract import (
    Features,
    HiddenTokens,
    fork_coverage,
    measure_fork_mass,
    run_backbone,
    support_for,
    with_scalars,
)
from moe_bias.features.source import FeatureSource, Subset
from moe_bias.features.store import FeatureStore
from moe_bias.layer import MoEBiasLayer
from moe_bias.tasks.conversations import Example
from moe_bias.training.checkpoint import Checkpoints, Position
from moe_bias.training.metrics import MetricsLog
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.run_folder import begin, digest, identity
from moe_bias.training.trainer import Evaluations, FitReport, Trainer, Watch

CALIBRATION_TOKENS = 4096
"""Forks for choosing a support are looked for among this many training tokens."""
NORMALISATION_TOKENS = 16384
"""The router's normalisation is measured on this many training tokens."""


@dataclass(frozen=True)
class Prepared:
    """Features to train on and to measure on, the layer's support and its coverage of held-out fork mass.

    `seconds` is what the training features took, backbone and all.
    """

    train: FeatureSource
    held_out: Features
    support: tuple[int, ...] | None
    fork_coverage: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Extracted:
    """Hidden states of both parts, and the seconds that the backbone took for the training part."""

    train: HiddenTokens
    held_out: HiddenTokens
    seconds: float


def prepare(
    model: nn.Module,
    head: Head,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: TrainingSettings,
    *,
    always: Sequence[int],
    batch_size: int,
) -> Prepared:
    """Runs the backbone once over both parts, and chooses the support on the training part.

    `always` are token ids that the support must hold. Raises UserError on a support that cannot be.
    """
    parse_support(settings.support, head.vocab_size)
    extracted = extract(model, train, held_out, batch_size)
    return with_support(head, extracted, settings.support, always)


def extract(model: nn.Module, train: Sequence[Example], held_out: Sequence[Example], batch_size: int) -> Extracted:
    """Runs the backbone once over both parts."""
    started = time.perf_counter()
    train_tokens = run_backbone(model, train, batch_size, "training hidden states")
    seconds = time.perf_counter() - started
    return Extracted(train_tokens, run_backbone(model, held_out, batch_size, "held-out hidden states"), seconds)


def with_support(head: Head, extracted: Extracted, support: str, always: Sequence[int]) -> Prepared:
    """Features on a support, chosen on the training part where `support` is 'auto:M'."""
    started, train, held_out = time.perf_counter(), extracted.train, extracted.held_out
    ids = parse_support(support, head.vocab_size)
    if isinstance(ids, int):
        forks = measure_fork_mass(head, train.hidden[:CALIBRATION_TOKENS])
        ids = support_for(forks, train.token, ids, always)
    features = with_scalars(head, train, ids, "training base distribution")
    seconds = extracted.seconds + time.perf_counter() - started
    return Prepared(
        features,
        with_scalars(head, held_out, ids, "held-out base distribution"),
        None if len(ids) == head.vocab_size else tuple(ids),
        fork_coverage(measure_fork_mass(head, held_out.hidden[:CALIBRATION_TOKENS]), ids),
        seconds,
    )


def prepare_stored(store: FeatureStore, head: Head, held_out: Sequence[int]) -> Prepared:
    """A store's tokens on its own support: a view to train on, and the examples `held_out` read into memory.

    Tokens are in the order of their examples, however the store is cut into parts. Coverage is of the
    held-out tokens that the store kept.
    """
    order = store.example.argsort(stable=True)
    is_held_out = torch.isin(store.example[order], torch.tensor(held_out))
    held = store.at(order[is_held_out])
    # Numbered anew: the numbers of the source's rows have gaps, which would count as examples without tokens.
    held = replace(held, example=held.example.unique(return_inverse=True)[1])
    return Prepared(
        Subset(store, order[~is_held_out]),
        held,
        None if store.manifest.support is None else tuple(store.manifest.support),
        fork_coverage(measure_fork_mass(head, held.hidden[:CALIBRATION_TOKENS]), store.manifest.support_ids()),
    )


def parse_support(text: str, vocab_size: int) -> int | list[int]:
    """The size to choose for 'auto:M', all ids for 'all', or the ids that a JSON file lists.

    Raises UserError on anything else, naming it.
    """
    if text == "all":
        return list(range(vocab_size))
    kind, _, size = text.partition(":")
    if kind == "auto" and size.isdecimal() and 1 <= int(size) <= vocab_size:
        return int(size)
    if kind == "auto" or not Path(text).is_file():
        raise UserError(
            f"--support {text!r} is none of 'auto:M' with M from 1 to {vocab_size}, 'all', or a JSON file of token ids"
        )
    return _support_from_file(Path(text), vocab_size)


def _support_from_file(path: Path, vocab_size: int) -> list[int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"support file {path} is not JSON: {error}") from error
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UserError(f"support file {path} must hold one list of token ids")
    try:
        check_support(ids)
        LayerConfig(support=tuple(ids)).check_vocabulary(vocab_size)
    except ValueError as error:
        raise UserError(f"support file {path}: {error}") from error
    return ids


def fresh_layer(settings: TrainingSettings, support: tuple[int, ...] | None, head: Head) -> MoEBiasLayer:
    """A layer that changes nothing yet; its router follows from the seed."""
    torch.manual_seed(settings.seed)
    return MoEBiasLayer(settings.layer_config(support), head.hidden_size, head.vocab_size)


def fit(
    layer: MoEBiasLayer,
    features: FeatureSource,
    head: Head,
    settings: TrainingSettings,
    description: str,
    evaluations: Evaluations | None = None,
) -> FitReport:
    """Trains a fresh layer in place on the features, without a folder.

    Raises UserError where the loss is not finite or above its bound; the layer then holds the last
    step's weights.
    """
    start(layer, features, settings)
    return Trainer(layer, features, head, settings, Watch(evaluations)).run(description)


def train(
    layer: MoEBiasLayer,
    source: FeatureSource,
    held_out: FeatureSource,
    head: Head,
    settings: TrainSFTSettings,
    processes: Processes = ALONE,
) -> FitReport:
    """Trains a fresh layer in place, with checkpoints and metrics in `settings.output`.

    An unfinished run of the same settings in that folder is gone on with, to the same bytes as if it
    had never stopped. Raises UserError where the folder's run is another one, or on the causes of
    `fit`; KeyboardInterrupt on Ctrl-C, once the step is in a checkpoint.
    """
    checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
    if processes.is_first:
        tokens = {"training tokens": digest(identity(source)), "held-out tokens": digest(identity(held_out))}
        begin(settings.output, settings.model_dump(mode="json"), {**tokens, "processes": processes.count})
    processes.wait()
    saved = checkpoints.load(Position)
    log = MetricsLog(settings.output, saved[1].step if saved else 0) if processes.is_first else None
    evaluations = Evaluations(held_out, settings.evaluate_every, settings.patience)
    start(layer, source, settings)
    trainer = Trainer(layer, source, head, settings, Watch(evaluations, checkpoints, log), processes)
    if saved is not None:
        trainer.resume(*saved)
    try:
        return trainer.run("training" if saved is None else f"training on from step {saved[1].step}")
    finally:
        if log is not None:
            log.close()


@torch.no_grad()
def start(layer: MoEBiasLayer, source: FeatureSource, settings: TrainingSettings) -> None:
    """Sets the router's normalisation, from tokens evenly spread over the source, and the gate's start."""
    count = min(len(source), NORMALISATION_TOKENS)
    rows = torch.arange(count) * len(source) // max(count, 1)
    layer.calibrate(source.at(rows).hidden.to(layer.experts.device), settings.normalisation)
    if layer.entropy_gate is not None:
        layer.entropy_gate.weight.fill_(settings.gate_alpha)
        layer.entropy_gate.bias.fill_(settings.gate_beta)
