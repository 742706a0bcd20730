"""Supervised training on hidden states: after one pass the backbone is not needed again.

`prepare_stored` takes features from a feature store, on its support or on another; `prepare` makes them in
memory.
`fit` trains a layer on them in memory, `train` does so in a folder, with checkpoints. The loop itself
is in `trainer`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.config import OWN_SUPPORT, LayerConfig, SFTConfig, StartOptions, check_support
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import (
    CALIBRATION_TOKENS,
    Features,
    evenly_spaced,
    fork_coverage,
    measure_fork_mass,
    run_backbone,
    support_for,
    with_scalars,
)
from moe_bias.features.source import FeatureSource, Subset, on_support
from moe_bias.features.store import FeatureStore
from moe_bias.layer import MoEBiasLayer, refuse_layer_beyond_memory
from moe_bias.mistakes import UserError, read_json
from moe_bias.tasks.conversations import Example
from moe_bias.training.batches import whole_units
from moe_bias.training.checkpoint import Checkpoints, Position
from moe_bias.training.loop import NOTHING_ELSE, Callback, Watching
from moe_bias.training.metrics import MetricsLog
from moe_bias.training.objectives import Objective
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.run_folder import begin, digests
from moe_bias.training.trainer import FitReport, Trainer, refuse_endless

NORMALISATION_TOKENS = 16384
"""The router's normalisation is measured on this many training tokens."""


@dataclass(frozen=True)
class Prepared:
    """Features to train on and to measure on, the layer's support and its coverage of held-out fork mass.

    `seconds` is what the training features took, backbone and all; of a store, its share by tokens.
    """

    train: FeatureSource
    held_out: Features
    support: tuple[int, ...] | None
    fork_coverage: float
    seconds: float = 0.0


def prepare(
    model: nn.Module,
    head: Head,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: SFTConfig,
    *,
    always: Sequence[int],
    batch_size: int,
) -> Prepared:
    """Runs the backbone once over both parts, and chooses the support on the training part.

    `always` are token ids that the support must hold. Raises UserError on a support that cannot be.
    """
    ids = parse_support(settings.support, head.vocab_size)
    started = time.perf_counter()
    tokens = run_backbone(model, train, batch_size, "training hidden states")
    if isinstance(ids, int):
        forks = measure_fork_mass(head, tokens.hidden[:CALIBRATION_TOKENS])
        ids = support_for(forks, tokens.token, ids, always)
    features = with_scalars(head, tokens, ids, "training base distribution")
    seconds = time.perf_counter() - started
    held = run_backbone(model, held_out, batch_size, "held-out hidden states")
    return _prepared(head, features, with_scalars(head, held, ids, "held-out base distribution"), seconds)


def prepare_stored(
    store: FeatureStore,
    head: Head,
    held_out: Sequence[int],
    support: str | Sequence[int] = OWN_SUPPORT,
    always: Sequence[int] = (),
) -> Prepared:
    """The two parts of `stored_parts`, with the support's coverage of the held-out tokens that the store kept."""
    return _prepared(head, *stored_parts(store, head, held_out, support, always))


def stored_parts(
    store: FeatureStore,
    head: Head,
    held_out: Sequence[int],
    support: str | Sequence[int] = OWN_SUPPORT,
    always: Sequence[int] = (),
) -> tuple[FeatureSource, Features, float]:
    """A store's tokens: a view to train on, and the examples `held_out` (their rows) read into memory.

    Tokens are in the order of their examples, however the store is cut into parts. A `support` other
    than the store's own is chosen on the training part, `always` in it; R, A and columns are then
    computed anew. The third is the seconds that the view took, by its share of the tokens. Raises UserError on a
    support that cannot be.
    """
    train_T, held_T = split_order(store, held_out)
    train: FeatureSource = Subset(store, train_T)
    held: FeatureSource = Subset(store, held_T)
    started = time.perf_counter()
    own = ids = store.manifest.support_ids()
    if support != OWN_SUPPORT:
        ids = _chosen(train, store.example[train_T], head, support, always)
    if ids != own:
        train = on_support(train, head, ids, "training base distribution")
    seconds = store.seconds * len(train) / len(store) + time.perf_counter() - started
    if ids != own:
        held = on_support(held, head, ids, "held-out base distribution")
    features = held.at(slice(None))
    # Numbered anew: the numbers of the source's rows have gaps, which would count as examples without tokens.
    features = replace(features, example=features.example.unique(return_inverse=True)[1])
    return train, features, seconds


def split_order(store: FeatureStore, held_out: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The numbers (T,) of a store's tokens to train on, and of those of the held-out rows, by example."""
    order = store.example.argsort(stable=True)
    is_held_out = torch.isin(store.example[order], torch.tensor(held_out))
    return order[~is_held_out], order[is_held_out]


def _chosen(
    source: FeatureSource, example_T: Tensor, head: Head, support: str | Sequence[int], always: Sequence[int]
) -> list[int]:
    """The ids that `support` names; those of 'auto:M' are chosen on examples evenly spaced over the source."""
    ids = parse_support(support, head.vocab_size) if isinstance(support, str) else list(support)
    if not isinstance(ids, int):
        return ids
    number_T, counts = example_T.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    sample_T = torch.isin(number_T, torch.tensor(evenly_spaced(counts.tolist()))).nonzero().squeeze(-1)
    return support_for(measure_fork_mass(head, source.at(sample_T).hidden), source.token, ids, always)


def _prepared(head: Head, train: FeatureSource, held_out: Features, seconds: float) -> Prepared:
    ids = train.support.tolist()
    return Prepared(
        train,
        held_out,
        None if len(ids) == head.vocab_size else tuple(ids),
        fork_coverage(measure_fork_mass(head, held_out.hidden[:CALIBRATION_TOKENS]), ids),
        seconds,
    )


def refuse_impossible(settings: StartOptions, head: Head, tokens: int | None = None) -> None:
    """Raises UserError, before anything is computed, on a layer beyond the machine's memory and on endless training.

    `tokens` are those to train on, where they are known.
    """
    own = settings.support == OWN_SUPPORT
    support = 1 if own else parse_support(settings.support, head.vocab_size)
    size = support if isinstance(support, int) else len(support)
    refuse_layer_beyond_memory(settings.layer_config(range(size)), head.hidden_size, head.vocab_size)
    if tokens is not None and isinstance(settings, SFTConfig):
        refuse_endless(settings, tokens)


def parse_support(text: str, vocab_size: int) -> int | list[int]:
    """The size to choose for 'auto:M', all ids for 'all', or the ids that a JSON file lists.

    Raises UserError on anything else, naming it.
    """
    if text == "all":
        return list(range(vocab_size))
    kind, _, size = text.partition(":")
    if kind == "auto" and size.isdecimal() and len(size) <= len(str(vocab_size)) and 1 <= int(size) <= vocab_size:
        return int(size)
    if kind == "auto" or not Path(text).is_file():
        raise UserError(
            f"`support` {text!r} is none of 'auto:M' with M from 1 to {vocab_size}, 'all', or a JSON file of token ids"
        )
    return _support_from_file(Path(text), vocab_size)


def _support_from_file(path: Path, vocab_size: int) -> list[int]:
    ids = read_json(path, "support file")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UserError(f"support file {path} must hold one list of token ids")
    try:
        check_support(ids)
        LayerConfig(support=tuple(ids)).check_vocabulary(vocab_size)
    except ValueError as error:
        raise UserError(f"support file {path}: {error}") from error
    return ids


def fresh_layer(settings: StartOptions, support: tuple[int, ...] | None, head: Head) -> MoEBiasLayer:
    """A layer that changes nothing yet; its router follows from the seed."""
    torch.manual_seed(settings.seed)
    return head.layer(settings.layer_config(support))


def fit(
    layer: MoEBiasLayer,
    features: FeatureSource,
    head: Head,
    settings: SFTConfig,
    description: str,
    watching: Watching = NOTHING_ELSE,
    held_out: FeatureSource | None = None,
    logits: BaseLogits | None = None,
    objective: Objective | None = None,
    target: Head | None = None,
) -> FitReport:
    """Trains a fresh layer in place on the features, without a folder; `logits` are theirs, where there are such.

    The layer is measured on `held_out`. `objective` is what is minimised (None: `Supervised` with the settings'
    `kl_weight`), `target` the head of the model that it is to come nearer to. Raises UserError where the loss is not
    finite or above its bound; the layer then holds the last step's weights.
    """
    features = first_tokens(features, settings.train_tokens, objective)
    start(layer, features, settings)
    trainer = Trainer(
        layer, features, head, settings, watching, logits=logits, objective=objective, held_out=held_out, target=target
    )
    with trained_on_support(layer):
        return trainer.run(description)


def train(
    layer: MoEBiasLayer,
    source: FeatureSource,
    held_out: FeatureSource,
    head: Head,
    settings: SFTConfig,
    checkpoints: Checkpoints,
    made_with: Mapping[str, Any],
    processes: Processes = ALONE,
    is_fresh: bool = True,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    target: Head | None = None,
) -> FitReport:
    """Trains a layer in place, with checkpoints and metrics in a folder; a fresh one is calibrated first.

    `made_with` are all settings of the run: an unfinished run of the same ones in that folder is gone on with, to the
    same bytes as if it had never stopped. `target` is the head of the model to come nearer to. Raises UserError where
    the folder's run is another one, or on the causes of `fit`; KeyboardInterrupt on Ctrl-C, once the step is in a
    checkpoint.
    """
    source = first_tokens(source, settings.train_tokens, objective)
    if processes.is_first:
        data = {**digests(source, held_out), "processes": processes.count}
        if objective is not None:
            data["objective"] = re.sub(" at 0x[0-9a-f]+", "", repr(objective))
        begin(checkpoints.run, made_with, data)
    processes.wait()
    saved = checkpoints.load(Position)
    log = MetricsLog(checkpoints.run, saved[1].step if saved else 0) if processes.is_first else None
    watching = Watching(
        evaluate_every=settings.evaluate_every,
        checkpoints=checkpoints,
        log=log,
        patience=settings.patience,
        callbacks=callbacks,
    )
    try:
        if is_fresh:
            start(layer, source, settings)
        trainer = Trainer(
            layer, source, head, settings, watching, processes, objective=objective, held_out=held_out, target=target
        )
        if saved is not None:
            trainer.resume(*saved)
        with trained_on_support(layer):
            return trainer.run("training" if saved is None else f"training on from step {saved[1].step}")
    finally:
        if log is not None:
            log.close()


def first_tokens(source: FeatureSource, count: int | None, objective: Objective | None = None) -> FeatureSource:
    """The first tokens of a source, so many of them; the whole source where it has no more.

    For an objective of answers or pairs those of the first whole ones, in a source where they stand one after another.
    """
    if count is None or count >= len(source):
        return source
    if objective is not None and objective.unit != "token":
        count = whole_units(source.example, count, objective.unit)
    return Subset(source, torch.arange(count))


@contextmanager
def trained_on_support(layer: MoEBiasLayer) -> Iterator[None]:
    """While open the layer acts on its support alone, which features are kept for; then as far as its config says."""
    layer.reach = "support"
    try:
        yield
    finally:
        layer.reach = layer.config.reach


@torch.no_grad()
def start(layer: MoEBiasLayer, source: FeatureSource, settings: StartOptions) -> None:
    """Sets the router's normalisation, from tokens evenly spread over the source, and the gate's start."""
    count = min(len(source), NORMALISATION_TOKENS)
    rows = torch.arange(count) * len(source) // max(count, 1)
    layer.calibrate(source.at(rows).hidden.to(layer.device), settings.normalisation)
    if layer.entropy_gate is not None:
        layer.entropy_gate.weight.fill_(settings.gate_alpha)
        layer.entropy_gate.bias.fill_(settings.gate_beta)
