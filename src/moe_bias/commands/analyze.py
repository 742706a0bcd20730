"""`moe-bias analyze`: what adapters do to the model on a text, in a folder that tables and reports read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from moe_bias.analysis.matter import Matter, Options
from moe_bias.analysis.record import FILE
from moe_bias.api.analysis import Run
from moe_bias.api.data import features_to_read, texts_of
from moe_bias.commands.analysis_table import print_analysis
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.looking_settings import AnalyzeSettings
from moe_bias.commands.material import keep, texts_named
from moe_bias.features.build import Choices, make_plan
from moe_bias.features.examples import encoded, length_limit, split
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.manifest import TEMPERATURE
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import frozen
from moe_bias.progress import say
from moe_bias.training.problems import prepare_task


def run(settings: AnalyzeSettings) -> None:
    """Reads the adapters that are not done yet, writes `analysis.json` and prints what it says.

    Raises UserError on adapters, texts or settings that cannot be used, and where the folder holds
    another analysis; Interrupted on Ctrl-C, saying how many adapters are done.
    """
    options = Options(**settings.model_dump(include=set(Options.__dataclass_fields__)))
    made_with = settings.model_dump(mode="json")
    work = Run(settings.adapter, settings.output, options, made_with, settings.checkpoints)
    console = report_console()
    try:
        with _opened(settings, work, console) as matter:
            record = work.record(matter)
    except KeyboardInterrupt as interrupt:
        raise work.so_far(interrupt) from interrupt
    print_analysis(console, record)
    say(console, f"{FILE} is in {settings.output}.")


@contextmanager
def _opened(settings: AnalyzeSettings, work: Run, console: Console) -> Iterator[Matter]:
    """What is looked at, while the block runs; features that are not to be kept are removed after it."""
    if settings.samples_answers:
        yield work.of_task(prepare_task(settings, settings, settings.seed))
    elif settings.store:
        yield _stored(settings, settings.store, work, console)
    else:
        with _extracted(settings, work, console) as matter:
            yield matter


def _stored(settings: AnalyzeSettings, folders: Sequence[str], work: Run, console: Console) -> Matter:
    store = FeatureStore.open(*folders)
    base = frozen(settings)
    store.check(model_facts(base.model, base.head, base.tokenizer), temperature=TEMPERATURE)
    corpus = texts_of(base, store, texts_named(settings), settings.max_length) if settings.data else None
    rows = None
    if settings.held_out is not None:
        rows = split(store.example.unique().tolist(), settings.held_out, settings.seed, ", ".join(folders))
    work.begin(base.head)
    if store.dropped:
        say(
            console,
            f"The store left out {store.dropped:,} tokens of base entropy below {store.manifest.threshold} nats: the "
            f"high stratum is the top {settings.rho:.0%} of the others",
        )
    return Matter.of_store(base, store, rows, "store", store.manifest.recipe.source, corpus)


@contextmanager
def _extracted(settings: AnalyzeSettings, work: Run, console: Console) -> Iterator[Matter]:
    texts, base = texts_named(settings), frozen(settings)
    limit, share, source = length_limit(base.model, settings.max_length), settings.held_out, settings.data
    corpus = encoded(texts.conversations, base.tokenizer, limit, source, console)
    rows = None if share is None else texts.held_out(corpus.rows, share, settings.seed)
    support = work.begin(base.head)
    choices = Choices(support, (), base.head.dtype, batch_size=settings.batch_size)
    plan = make_plan(corpus, source, model_facts(base.model, base.head, base.tokenizer), choices)
    with features_to_read(base, plan, keep(settings), console) as store:
        yield Matter.of_store(base, store, rows, "data", source, corpus)
