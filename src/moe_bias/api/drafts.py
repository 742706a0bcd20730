"""A layer on a small model that brings it nearer to a larger one, whose draft model it is to be.

The target's hidden states of the same answers are extracted beside the draft's, into a store of their own, and the
scalars that depend on both are taken in one pass of the two output embeddings; neither backbone is run again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe_bias.adapter import save_layer
from moe_bias.api.arguments import config_of, refuse_other_base, refuse_other_layer
from moe_bias.api.data import refuse_other_data, stored
from moe_bias.api.reports import DraftReport
from moe_bias.api.run_place import folder_of_adapter
from moe_bias.api.supervised import Extra, on_own_support, prepared_for
from moe_bias.config import DraftConfig
from moe_bias.evaluation.drafts import draft_figures, draft_tokens
from moe_bias.features.build import Choices, make_plan
from moe_bias.features.examples import length_limit
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.source import FeatureSource, Subset
from moe_bias.features.store import FeatureStore
from moe_bias.features.target import WithTarget, with_target
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted, UserError, shown
from moe_bias.progress import text_console
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.data import Data
from moe_bias.training.loop import Callback
from moe_bias.training.metrics import read_metrics
from moe_bias.training.objectives import Distillation, Objective, make_objective
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.sft import Prepared, fresh_layer, refuse_impossible, split_order, train

PLAIN, ADAPTED = "plain", "adapted"
"""The draft as it is, and under the layer."""


def train_draft(
    small: Frozen,
    large: Frozen,
    data: Data,
    config: DraftConfig | None = None,
    *,
    layer: MoEBiasLayer | None = None,
    objective: Objective | str | None = None,
    callbacks: Sequence[Callback] = (),
    keep: bool | str | Path = True,
    batch_size: int = 16,
    output: str | Path | None = None,
    checkpoint_every: int = 200,
    keep_checkpoints: int = 2,
) -> tuple[MoEBiasLayer, DraftReport]:
    """Trains a layer on `small` that brings it nearer to `large`, and measures it as a draft model on held-out answers.

    `data` is what `moe_bias.extract(small, rows)` returns. The answers' hidden states of `large` are extracted too,
    `batch_size` answers at a time, and kept as `extract` keeps them, by `keep`. The layer is a fresh one of the
    config's choices, or a copy of `layer`, trained on. `objective` is what is minimised (None: `Distillation` with the
    config's `reverse`). `callbacks`, `output` and checkpoints are those of `train_sft`.

    Raises UserError where the two models do not share a vocabulary, on data that cannot be used, on a config that
    cannot be, where `output` holds an adapter or a run of other settings, and where the loss is not finite; Interrupted
    on Ctrl-C, saying where the same call goes on.
    """
    refuse_other_base(small, "small")
    refuse_other_base(large, "large")
    refuse_other_data(data, small)
    refuse_other_vocabulary(small.tokenizer, large.tokenizer)
    config, minimised = config_of(config, DraftConfig), make_objective(objective)
    if layer is not None:
        refuse_other_layer(layer, small)
    config = on_own_support(data, config)
    made_with = config.model_dump(mode="json")
    refuse_impossible(config, small.head, len(data.store))
    with folder_of_adapter(output, "draft", made_with) as folder, ExitStack() as stack:
        target = target_store(large, data, keep, batch_size, stack)
        towards = Towards.of(large, data, prepared_for(data, config, layer), target)
        own = fresh_layer(config, towards.prepared.support, small.head) if layer is None else copy.deepcopy(layer)
        checkpoints = Checkpoints(folder, checkpoint_every, keep_checkpoints)
        extra = Extra(layer is None, minimised, callbacks)
        report = train_towards(towards, own, config, checkpoints, made_with, extra=extra)
        if output is not None:
            save_draft(folder, own, report, towards, made_with)
    return own, report


@dataclass(frozen=True)
class Towards:
    """A draft's prepared tokens, train and held out, with what the target says of them."""

    large: Frozen
    data: Data
    prepared: Prepared

    @classmethod
    def of(cls, large: Frozen, data: Data, prepared: Prepared, store: FeatureStore) -> Towards:
        """Puts the target's stored tokens beside the draft's. Raises UserError on a support beyond its vocabulary."""
        support, size = prepared.train.support, large.head.vocab_size
        if int(support.max()) >= size:
            raise UserError(
                f"`support` has token id {int(support.max())}, and the target has rows for {size:,} tokens; name a "
                "support of tokens that both have, such as 'auto:4096'"
            )
        train, held_out = (Subset(store, order) for order in split_order(store, data.held_out))
        beside = cls._beside(large, data, prepared.train, train, "training target")
        held = cls._beside(large, data, prepared.held_out, held_out, "held-out target")
        return cls(large, data, replace(prepared, train=beside, held_out=held.at(slice(None))))

    @staticmethod
    def _beside(
        large: Frozen, data: Data, source: FeatureSource, target: FeatureSource, description: str
    ) -> WithTarget:
        return with_target(source, target, data.base.head, large.head, description)

    @property
    def support_mass(self) -> float:
        """The mean of the target's probability that the support holds, over held-out tokens."""
        held_out = self.prepared.held_out
        assert held_out.target is not None
        return 1 - float(held_out.target.scalars.rest_mass.mean())


def target_store(
    large: Frozen,
    data: Data,
    keep: bool | str | Path,
    batch_size: int,
    own: ExitStack,
    processes: Processes = ALONE,
    console: Console | None = None,
) -> FeatureStore:
    """The target's hidden states of the data's answers, found or made; what is not to be kept goes as `own` is closed.

    Raises UserError on data without texts, with a part of the tokens alone, or beyond the target's context.
    """
    if data.corpus is None:
        raise UserError("`data` is a feature store alone, and the target reads its texts; give both, or the texts")
    if data.store.dropped:
        raise UserError("`data` lacks tokens that the store left out; extract again without `keep_top`")
    refuse_longer(large.model, max(map(len, data.corpus.examples)))
    head = large.head
    choices = Choices(list(range(head.vocab_size)), hidden_dtype=head.dtype, batch_size=batch_size)
    facts = model_facts(large.model, head, large.tokenizer)
    plan = make_plan(data.corpus, data.store.manifest.recipe.source, facts, choices)
    return stored(large, plan, keep, own, processes, console or text_console())


def refuse_longer(large: Any, longest: int) -> None:
    """Raises UserError where the longest example has more tokens than the target, a model or its config's, reads."""
    limit = length_limit(large, longest)
    if longest > limit:
        raise UserError(
            f"an example has {longest:,} tokens, and the target reads {limit:,}; extract with `max_length` {limit}"
        )


def train_towards(
    towards: Towards,
    layer: MoEBiasLayer,
    config: DraftConfig,
    checkpoints: Checkpoints,
    made_with: Mapping[str, Any],
    processes: Processes = ALONE,
    extra: Extra | None = None,
) -> DraftReport:
    """Trains the layer in place in the folder of the checkpoints, and measures it beside the draft as it is."""
    extra, prepared, head = extra or Extra(), towards.prepared, towards.data.base.head
    objective = extra.objective or Distillation(config.reverse)
    try:
        fitted = train(
            layer,
            prepared.train,
            prepared.held_out,
            head,
            config,
            checkpoints,
            made_with,
            processes,
            extra.is_fresh,
            objective,
            extra.callbacks,
            towards.large.head,
        )
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:
        raise checkpoints.interrupted() from interrupt
    found = draft_tokens([None, layer], prepared.held_out, head, towards.large.head)
    named = dict(zip((PLAIN, ADAPTED), found, strict=True))
    return DraftReport(
        draft_figures(named, prepared.held_out.example, towards.data.by_unit),
        steps=fitted.steps,
        layer_step=fitted.layer_step,
        layer_loss=fitted.held_out_nll,
        parameters=layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
        train_tokens=len(prepared.train),
        held_out_tokens=len(prepared.held_out),
        support_mass=towards.support_mass,
        curve=read_metrics(checkpoints.run),
    )


def save_draft(
    folder: Path,
    layer: MoEBiasLayer,
    report: DraftReport,
    towards: Towards,
    made_with: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes the record, `more` in it, and then the adapter, so that none is without its record."""
    name = str(getattr(towards.large.model, "name_or_path", ""))
    record = {
        "kind": RecordKind.DRAFT,
        "settings": {"target": name, **made_with},
        "provenance": provenance(),
        "rows": report.record_rows(),
        "support_mass": report.support_mass,
        "tokens": {"train": report.train_tokens, "held_out": report.held_out_tokens},
        "training": {"steps": report.steps, "layer_step": report.layer_step, "held_out_loss": report.layer_loss},
    }
    write_json(folder / "record.json", record | dict(more or {}))
    save_layer(layer, folder, towards.data.base.model, towards.prepared.fork_coverage)


def refuse_other_vocabulary(small: PreTrainedTokenizerBase, large: PreTrainedTokenizerBase) -> None:
    """Raises UserError where an id is one token of `small` and another of `large`, or a token has two ids.

    Ids that only one of them knows, such as special tokens or rows that pad an embedding, are no contradiction.
    """
    ours, theirs = (one.get_vocab() for one in (small, large))
    token_of = {number: token for token, number in theirs.items()}
    for token, number in sorted(ours.items(), key=lambda pair: pair[1]):
        other, again = token_of.get(number, token), theirs.get(token, number)
        if other != token:
            what = f"token id {number} is {shown(token)} of the draft and {shown(other)} of the target"
        elif again != number:
            what = f"token {shown(token)} has id {number} of the draft and {again} of the target"
        else:
            continue
        raise UserError(f"{what}: a draft needs the target's vocabulary; give two models of one tokenizer")
    if not ours.keys() & theirs.keys():
        raise UserError("draft and target have no token in common; give two models of one tokenizer")
