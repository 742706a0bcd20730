"""Choosing among labels: ways to do it beside each other, from the hidden states at the ends of the prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_bias.adapter import save_layer
from moe_bias.api.arguments import config_of, refuse_other_base
from moe_bias.api.data import stored
from moe_bias.api.reports import Curve, Report
from moe_bias.api.run_place import folder_of
from moe_bias.config import LabelsConfig
from moe_bias.experiments.arm import ArmRecords, Outcome, Wanted
from moe_bias.experiments.label_arms import (
    MOE_BIAS,
    STATIC,
    Chosen,
    Labels,
    Texts,
    as_lists,
    drawn,
    logistic,
    trained,
    zero_shot_arms,
)
from moe_bias.experiments.label_lora import one_token, run_lora
from moe_bias.experiments.label_probe import probe, refuse_without_probe
from moe_bias.experiments.labels import MAIN, LabelCell, LabelRow, arm_name, compare_labels
from moe_bias.features.build import Choices, make_plan
from moe_bias.features.examples import length_limit
from moe_bias.features.extract import Features, measure_fork_mass, support_for
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.source import on_support
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import Frozen
from moe_bias.mistakes import UserError
from moe_bias.progress import say, text_console
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.report.table import Table
from moe_bias.report.tables import LEAD, ways
from moe_bias.tasks.conversations import Corpus, Example, answer_ends, encode
from moe_bias.tasks.labels import (
    CONTENT_FREE,
    FEWEST_OF_A_LABEL,
    Asking,
    LabelledText,
    label_tokens,
    labels_of,
    read_labelled,
)
from moe_bias.training.processes import ALONE
from moe_bias.training.run_folder import begin, digest, refuse_other_settings

RECORD, ADAPTERS = "record.json", "adapters"
DEFAULT_SUPPORT = 4096
SHARD_TOKENS = 256
"""Of answers, which have two or three tokens: what an interrupt loses of the pass through the model."""
WITHOUT_LABELS = ("zero-shot", "contextual", "divided")
PROBE = "probe"
LEARNING = ("static", "logistic", PROBE, "moe-bias")
_FREE = {"arms", "seeds", "lora_counts", "lora_seeds"}
"""Choices of what is run that change nothing about what else is in the folder."""


def labels(
    base: Frozen,
    rows: str | Path | Sequence[Any],
    config: LabelsConfig | None = None,
    *,
    output: str | Path | None = None,
) -> LabelsReport:
    """Ways to choose among labels, compared on the same texts: what `moe-bias labels` does.

    `rows` are dicts with a text and its label, a JSON Lines file of such, or the name of a data set on the Hub. The
    first texts of a fixed order are measured on; each seed draws those to learn from out of the next ones. Every text
    goes through the model once, LoRA's apart, and its hidden state is kept in the user's cache. In `output` every way
    that is done is kept, so that the same call goes on after an interrupt; and at the end the record, and the layers of
    MoE-Bias of the first seed as adapters, in `adapters` by their number of labels, those of the probe as `probe-N`.
    Without it nothing stays. Where no `arms` are named, the probe's layer is left out for a model with a soft-cap.

    Raises UserError on rows that cannot be used, on labels that begin with the same token, where there are too few
    texts, and where `output` holds a comparison of other settings or texts; Interrupted on Ctrl-C.
    """
    refuse_other_base(base)
    config = config_of(config, LabelsConfig)
    if PROBE in config.arms:
        refuse_without_probe(base.head)
    with folder_of(output, "labels") as folder:
        ground = _ground(base, str(rows) if isinstance(rows, Path) else rows, config, folder, text_console())
        return _compared(ground, config, folder)


@dataclass(frozen=True, repr=False)
class LabelsReport(Report):
    """Ways to choose among labels, measured on so many `texts`: each with each number of labels that it learnt from.

    `ways[i].change` is its paired change to zero-shot, `ways[i].lead` that of MoE-Bias to it.
    """

    ways: Sequence[LabelRow]
    source: str
    labels: Sequence[str]
    texts: int
    curve: Curve = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.texts:,} texts of {self.source}, labels {', '.join(self.labels)} [95% interval over texts]"

    @property
    def table(self) -> Table:
        """Accuracy of each way, what MoE-Bias has over it, its calibration error and NLL, and what it took."""
        whole = ways([asdict(row) for row in self.ways])
        kept = whole.only("way", "labels", "right, %", LEAD, "ECE, %", "NLL, nats", "parameters", "seconds")
        return replace(kept, caption="")


@dataclass(frozen=True)
class _Split:
    """The texts as examples: those to measure on, those to learn from, and inputs without content."""

    asking: Asking
    source: str
    token: list[int]
    test: list[Example]
    pool: list[Example]
    free: list[Example]

    @property
    def examples(self) -> list[Example]:
        return [*self.test, *self.pool, *self.free]


@dataclass(frozen=True)
class _Ground:
    """What all ways share."""

    base: Frozen
    split: _Split
    labels: Labels
    test: Texts
    pool: Texts
    free: Texts
    store: FeatureStore


def _ground(base: Frozen, rows: str | Sequence[Any], config: LabelsConfig, folder: Path, console: Console) -> _Ground:
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    refuse_other_settings(folder, settings)
    split = _split(base, rows, config, console)
    store = _store(base, split, config, console)
    begin(folder, settings, {"texts": digest([store.token, store.example]), "hidden states": digest(store.contents())})
    token_K = torch.tensor(split.token)
    own = store.at((store.position == 0).nonzero()[:, 0])
    own = own.at(own.example.argsort())
    wide = on_support(own, base.head, _default_support(base, split, own, config), "the default support").at(slice(None))
    ends = [0, len(split.test), len(split.test) + len(split.pool), len(split.examples)]
    test, pool, free = (Texts.of(own.at(rows), wide.at(rows), token_K) for rows in starmap(slice, pairwise(ends)))
    return _Ground(base, split, Labels(base.head, token_K), test, pool, free, store)


def _default_support(base: Frozen, split: _Split, own: Features, config: LabelsConfig) -> list[int]:
    """As `extract` chooses it, on the texts to learn from: those to measure on have no say in it."""
    pool = own.at(slice(len(split.test), len(split.test) + len(split.pool)))
    always = sorted({*answer_ends(base.model, base.tokenizer, config.chat), *split.token})
    size = min(DEFAULT_SUPPORT, base.head.vocab_size)
    return support_for(measure_fork_mass(base.head, pool.hidden), pool.token, size, always)


def _split(base: Frozen, rows: str | Sequence[Any], config: LabelsConfig, console: Console) -> _Split:
    """The texts in an order of their own, as far as they are needed."""
    texts, source = read_labelled(rows, config.split, config.text_column, config.label_column)
    asking = Asking(config.template, labels_of(texts, source), config.chat)
    limit = length_limit(base.model, config.max_length)
    token = label_tokens(asking, base.tokenizer, limit)
    wanted = config.test_texts + max(config.label_counts)
    found, long = _encoded(random.Random(0).sample(texts, len(texts)), asking, base, limit, wanted)
    if long:
        say(console, f"{long} texts are left out: with their prompts they exceed {limit} tokens")
    if len(found) < wanted:
        raise UserError(
            f"{source} has {len(found)} usable texts; {config.test_texts} to measure on (`test_texts`) and "
            f"{max(config.label_counts)} to learn from (`label_counts`) are {wanted}"
        )
    free = [encode(asking.conversation(text, asking.labels[0]), base.tokenizer, limit) for text in CONTENT_FREE]
    pool = found[config.test_texts :]
    _refuse_rare(asking, token, pool, source, min(config.label_counts))
    return _Split(asking, source, token, found[: config.test_texts], pool, [one for one in free if one is not None])


def _encoded(
    texts: Sequence[LabelledText], asking: Asking, base: Frozen, limit: int, wanted: int
) -> tuple[list[Example], int]:
    """So many examples, or as many as there are; and how many texts had no room."""
    found: list[Example] = []
    for number, text in enumerate(texts):
        if len(found) == wanted:
            return found, number - wanted
        example = encode(asking.conversation(text.text, text.label), base.tokenizer, limit)
        found += [] if example is None else [example]
    return found, len(texts) - len(found)


def _refuse_rare(asking: Asking, token: Sequence[int], pool: Sequence[Example], source: str, fewest: int) -> None:
    """Raises UserError where a label has too few texts to learn from, or the labels are too many for the fewest."""
    if fewest < FEWEST_OF_A_LABEL * len(token):
        raise UserError(
            f"`label_counts` has {fewest}, and {source} has {len(token)} labels; give at least "
            f"{FEWEST_OF_A_LABEL * len(token)}, {FEWEST_OF_A_LABEL} of each"
        )
    firsts = [example.completion_ids[0] for example in pool]
    for label, first in zip(asking.labels, token, strict=True):
        if firsts.count(first) < FEWEST_OF_A_LABEL:
            raise UserError(
                f"{source} has {firsts.count(first)} texts of the label {label!r} to learn from, and at least "
                f"{FEWEST_OF_A_LABEL} are needed; leave it out, or give more in `label_counts`"
            )


def _store(base: Frozen, split: _Split, config: LabelsConfig, console: Console) -> FeatureStore:
    """Hidden states of the answers on the support of the labels' tokens, in the user's cache."""
    dtype, batch_size = base.head.dtype, config.batch_size
    choices = Choices(split.token, hidden_dtype=dtype, shard_tokens=SHARD_TOKENS, batch_size=batch_size)
    corpus = Corpus(split.examples, list(range(len(split.examples))), 0)
    plan = make_plan(corpus, split.source, model_facts(base.model, base.head, base.tokenizer), choices)
    return stored(base, plan, True, ExitStack(), ALONE, console)


def _compared(ground: _Ground, config: LabelsConfig, folder: Path) -> LabelsReport:
    arms = ArmRecords(folder, RecordKind.LABELS, LabelCell).run_missing(_wanted(ground, config, folder))
    rows = compare_labels(arms, ground.test.label.tolist())
    report = LabelsReport(rows, ground.split.source, ground.split.asking.labels, len(ground.test))
    write_json(folder / RECORD, _record(ground, config, report))
    return report


def _record(ground: _Ground, config: LabelsConfig, report: LabelsReport) -> dict[str, Any]:
    tokens = [len(example.prompt_ids) for example in ground.split.examples]
    name = ground.store.manifest.recipe.model.name
    model = Path(name).name if Path(name).is_dir() else name
    return {
        "kind": RecordKind.LABELS,
        "settings": {"model": model, **config.model_dump(mode="json")},
        "dtype": str(ground.base.head.dtype).removeprefix("torch."),
        "source": Path(report.source).name,
        "labels": list(report.labels),
        "texts": report.texts,
        "shares": [round(float((ground.test.label == k).double().mean()), 4) for k in range(len(report.labels))],
        "prompt_tokens": sum(tokens) / len(tokens),
        "forward_seconds": ground.store.seconds / len(tokens),
        "rows": [asdict(row) for row in report.ways],
        "provenance": provenance(),
    }


def _wanted(ground: _Ground, config: LabelsConfig, folder: Path) -> Wanted[LabelCell]:
    """What runs each way with each number of labels and seed."""
    ways: Sequence[str] = config.arms or [*WITHOUT_LABELS, *LEARNING]
    if not config.arms and ground.base.head.transform.cap is not None:
        ways = [way for way in ways if way != PROBE]
    wanted: dict[tuple[str, int], Callable[[], Outcome[LabelCell]]] = {}

    def want(way: str, count: int, seed: int, run: Callable[[], Chosen]) -> None:
        wanted[arm_name(way, count), seed] = partial(_outcome, ground, config, folder, way, count, seed, run)

    for way in (way for way in WITHOUT_LABELS if way in ways):
        want(way, 0, 0, partial(_without_labels, ground, way))
    for count in config.label_counts:
        for way in (way for way in LEARNING if way in ways):
            for seed in config.seeds:
                want(way, count, seed, partial(_learnt, ground, config, way, count, seed))
        for seed in config.lora_seeds if "lora" in ways and count in config.lora_counts else ():
            want("lora", count, seed, partial(_lora, ground, config, count, seed))
    return wanted


def _outcome(
    ground: _Ground, config: LabelsConfig, folder: Path, way: str, count: int, seed: int, run: Callable[[], Chosen]
) -> Outcome[LabelCell]:
    """Runs a way; the layers of MoE-Bias and of the probe with the first seed are kept as adapters."""
    chosen = run()
    if chosen.layer is not None and way in (MAIN, PROBE) and seed == config.seeds[0]:
        name = str(count) if way == MAIN else f"{PROBE}-{count}"
        save_layer(chosen.layer, folder / ADAPTERS / name, ground.base.model)
    spent = (chosen.seconds, chosen.search_seconds, chosen.parameters)
    cell = LabelCell(way, count, seed, as_lists(chosen.log_prob), *spent, dict(chosen.choice or {}))
    return cell, config.model_dump(mode="json")


def _without_labels(ground: _Ground, name: str) -> Chosen:
    return zero_shot_arms(ground.labels, ground.test, ground.free)[name]


def _learnt(ground: _Ground, config: LabelsConfig, name: str, count: int, seed: int) -> Chosen:
    train = ground.pool.at(drawn(ground.pool.label, count, FEWEST_OF_A_LABEL, seed))
    if name == "logistic":
        return logistic(train, ground.test, config.folds)
    if name == PROBE:
        return probe(ground.labels, train, ground.test, config.folds)
    arm = MOE_BIAS if name == MOE_BIAS.name else STATIC
    return trained(arm, ground.labels, train, ground.test, config.folds, seed)


def _lora(ground: _Ground, config: LabelsConfig, count: int, seed: int) -> Chosen:
    rows = drawn(ground.pool.label, count, FEWEST_OF_A_LABEL, seed).tolist()
    train, test = (
        [one_token(example.prompt_ids, example.completion_ids[0]) for example in part]
        for part in ([ground.split.pool[row] for row in rows], ground.split.test)
    )
    return run_lora(ground.base.model, ground.labels, train, test, config, seed)
