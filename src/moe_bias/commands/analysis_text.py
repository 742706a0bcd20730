"""What `analyze` looks at: the frozen model, the adapters' layers, and a text with its hidden states.

The text is a feature store, or prompts and answers that are extracted into one, or the frozen model's greedy
answers to a task's held-out problems. The latter two are given the first adapter's support, so that it is read
from the store's scalars; adapters on another support are read over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_bias.analysis.answers import Answered
from moe_bias.analysis.survey import Text
from moe_bias.api.data import stored, texts_of
from moe_bias.backbone import Head
from moe_bias.commands.looking_settings import AnalyzeSettings
from moe_bias.commands.material import keep, texts_named
from moe_bias.features.build import Choices, Plan, make_plan
from moe_bias.features.examples import encoded, length_limit, split
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.manifest import MANIFEST, TEMPERATURE, first_difference, other_store, read_manifest
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import as_kind, read_json
from moe_bias.progress import say
from moe_bias.records import write_json
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import Policy, base_policy
from moe_bias.tasks.conversations import Corpus, Example
from moe_bias.training.problems import TaskData, prepare_task, saved_layer
from moe_bias.training.processes import ALONE
from moe_bias.training.run_folder import begin, digest

BASE_ANSWERS = "base-answers.json"
_OF_NO_CONCERN = frozenset({"support", "held_out", "shard_tokens", "batch_size"})
"""Fields of a recipe that analysis asks nothing of: it reads tokens on any support, all of them or those held out."""


@dataclass(frozen=True)
class Matter:
    """All that is looked at. `examples` are by row, and none where their prompts are not known.

    `ground` and `answers`, the frozen model's to its problems, are there for a task alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    layers: list[MoEBiasLayer]
    text: Text
    kind: str
    name: str
    dropped: int = 0
    examples: Mapping[int, Example] = field(default_factory=dict)
    ground: TaskData | None = None
    answers: Sequence[Answered] = ()


@contextmanager
def opened(settings: AnalyzeSettings, console: Console) -> Iterator[Matter]:
    """The matter while the block runs; features that are not to be kept are removed after it.

    Raises UserError on adapters, data, stores or problems that cannot be used.
    """
    if settings.samples_answers:
        yield _sampled(settings)
    elif settings.store:
        yield _stored(settings, settings.store, console)
    else:
        with _extracted(settings, console) as matter:
            yield matter


def greedy_answered(
    ground: TaskData, policies: Sequence[Policy], settings: AnalyzeSettings, description: str
) -> list[list[Answered]]:
    """Greedy answers to the held-out problems with their verdicts, by policy, then by problem."""
    columns = greedy_answers(
        ground.model,
        ground.head,
        ground.test.prompts,
        policies,
        stop_ids=ground.stop_ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        description=description,
    )
    answered = []
    for column in columns:
        texts = [ground.tokenizer.decode(answer.token_ids) for answer in column]
        verdicts = ground.task.verify(ground.test.problems, texts)
        answered.append(
            [Answered(answer.all_ids, verdict.outcome) for answer, verdict in zip(column, verdicts, strict=True)]
        )
    return answered


def _layers(settings: AnalyzeSettings, head: Head) -> list[MoEBiasLayer]:
    """Of the adapters; the last thing that can be wrong, so that from here on the folder is this analysis's."""
    layers = [saved_layer(name, head).layer.eval() for name in settings.adapter]
    named = zip(settings.adapter, layers, strict=True)
    contents = {f"adapter {name}": digest(layer.state_dict().values()) for name, layer in named}
    begin(settings.output, settings.model_dump(mode="json"), contents)
    return layers


def _support(layer: MoEBiasLayer) -> list[int]:
    return layer.support_or_all().tolist()


def _stored(settings: AnalyzeSettings, folders: Sequence[str], console: Console) -> Matter:
    store = FeatureStore.open(*folders)
    base = frozen(settings)
    model, tokenizer, head = base.model, base.tokenizer, base.head
    store.check(model_facts(model, head, tokenizer), temperature=TEMPERATURE)
    examples = _by_row(texts_of(base, store, texts_named(settings), settings.max_length)) if settings.data else {}
    text, name = _text(store, _held_out(store, settings, ", ".join(folders))), store.manifest.recipe.source
    layers = _layers(settings, head)
    if store.dropped:
        say(
            console,
            f"The store left out {store.dropped:,} tokens of base entropy below {store.manifest.threshold} nats: the "
            f"high stratum is the top {settings.rho:.0%} of the others",
        )
    return Matter(model, tokenizer, head, layers, text, "store", name, store.dropped, examples)


@contextmanager
def _extracted(settings: AnalyzeSettings, console: Console) -> Iterator[Matter]:
    texts, base = texts_named(settings), frozen(settings)
    model, tokenizer, head = base.model, base.tokenizer, base.head
    corpus = encoded(texts.conversations, tokenizer, length_limit(model, settings.max_length), settings.data, console)
    share = settings.held_out
    held_out = None if share is None else texts.held_out(corpus.rows, share, settings.seed)
    layers = _layers(settings, head)
    choices = Choices(_support(layers[0]), (), head.dtype, batch_size=settings.batch_size)
    plan = make_plan(corpus, settings.data, model_facts(model, head, tokenizer), choices)
    with ExitStack() as folder:
        found = _found(settings.features, plan, console)
        store = stored(base, plan, keep(settings), folder, ALONE, console) if found is None else found
        text = _text(store, held_out)
        yield Matter(model, tokenizer, head, layers, text, "data", settings.data, examples=_by_row(corpus))


def _found(folder: Path | None, plan: Plan, console: Console) -> FeatureStore | None:
    """A whole store of the same texts that was made otherwise, such as by training on them; None where there is none.

    Raises UserError where the folder's is of another model or other texts, or lacks tokens.
    """
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if first_difference(manifest.recipe, plan.recipe) is None:
        return None
    wrong = first_difference(manifest.recipe, plan.recipe, _OF_NO_CONCERN)
    if wrong is not None:
        raise other_store(folder, manifest, wrong)
    say(console, f"hidden states found in {folder}: the model is not run for them")
    return FeatureStore.open(folder)


def _sampled(settings: AnalyzeSettings) -> Matter:
    ground = prepare_task(settings, settings, settings.seed)
    layers = _layers(settings, ground.head)
    answers = _base_answers(ground, settings)
    examples = [Example(p, answer.token_ids) for p, answer in zip(ground.test.prompts, answers, strict=True)]
    tokens = run_backbone(ground.model, examples, settings.batch_size, "hidden states of the answers")
    features = with_scalars(ground.head, tokens, _support(layers[0]), "their base distribution")
    return Matter(
        ground.model,
        ground.tokenizer,
        ground.head,
        layers,
        Text(features),
        "task",
        ground.task.name,
        examples=dict(enumerate(examples)),
        ground=ground,
        answers=answers,
    )


@dataclass(frozen=True)
class _BaseAnswers:
    """What the file of the frozen model's answers holds."""

    answers: list[Answered]


def _base_answers(ground: TaskData, settings: AnalyzeSettings) -> list[Answered]:
    """Kept in the folder, so that a run that is gone on with does not sample them again."""
    path = settings.output / BASE_ANSWERS
    if path.is_file():
        remedy = "remove it to sample the answers again"
        found = as_kind(_BaseAnswers, read_json(path, "file", remedy), f"file {str(path)!r}", remedy)
        return list(found.answers)
    answers = greedy_answered(ground, [base_policy], settings, "answers of the frozen model")[0]
    write_json(path, {"answers": [asdict(answer) for answer in answers]})
    return answers


def _by_row(corpus: Corpus) -> dict[int, Example]:
    return dict(zip(corpus.rows, corpus.examples, strict=True))


def _held_out(store: FeatureStore, settings: AnalyzeSettings, name: str) -> list[int] | None:
    """The examples that training on this store kept out; None where all are asked for."""
    if settings.held_out is None:
        return None
    rows = torch.cat([part.example.unique() for part in store.parts()]).unique().tolist()
    return split(rows, settings.held_out, settings.seed, name)


def _text(store: FeatureStore, rows: list[int] | None) -> Text:
    """These examples of a store; all of it for None."""
    return Text(store) if rows is None else Text(store, torch.tensor(rows))
