"""Where a supervised command's hidden states come from: `--store`, `--data`, or other texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from rich.console import Console

from moe_bias.api.data import Extraction, Texts, fitted, of_texts, opened_store, rows_held_out, texts_of
from moe_bias.commands.training_settings import SupervisedSettings, TextSettings
from moe_bias.frozen import Frozen, frozen
from moe_bias.mistakes import UserError
from moe_bias.training.data import Data
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.sft import refuse_impossible


@contextmanager
def opened(
    settings: SupervisedSettings,
    console: Console,
    processes: Processes = ALONE,
    texts: Texts | None = None,
    pairs: bool = False,
) -> Iterator[Data]:
    """The features while the block runs; those that are not to be kept are removed after it.

    `texts` are what to extract from where the settings name neither data nor a store; the rows of the settings' data
    are preferences with `pairs`. Raises UserError on data,
    stores or settings that cannot be used, before the model is loaded where that can be told; Interrupted where an
    extraction was, with what is whole.
    """
    if settings.store:
        data = stored(settings, settings.store, console, processes)
    else:
        data = _extracted(settings, texts or texts_named(settings, pairs), console, processes)
    with closing(data):
        yield data


def texts_named(settings: TextSettings, pairs: bool = False) -> Texts:
    """The rows of the settings' data, preferences with `pairs`. Raises UserError where they cannot be read."""
    return Texts.of(settings.data, settings.split, settings.train_on, pairs)


def keep(settings: TextSettings) -> bool | str:
    """Where hidden states are kept, as `extract` takes it."""
    return str(settings.features) if settings.features else settings.keep_features


def stored(
    settings: SupervisedSettings,
    folders: list[str],
    console: Console,
    processes: Processes,
    base: Frozen | None = None,
) -> Data:
    """The features in these folders, of the settings' model, which is `base` where it is loaded already."""
    store = opened_store(folders, processes)
    rows_held_out(store, folders, settings.held_out, settings.seed)
    base = base or frozen(settings)
    refuse_impossible(settings, base.head, len(store))
    data = fitted(base, store, folders, settings.held_out, settings.seed, console)
    if not settings.data:
        return data
    if store.dropped:
        raise UserError("the store left out tokens that LoRA would be trained on; extract again without --keep-top")
    return replace(data, corpus=texts_of(base, store, texts_named(settings), settings.max_length))


def _extracted(settings: SupervisedSettings, texts: Texts, console: Console, processes: Processes) -> Data:
    base: Frozen = frozen(settings)
    how = Extraction(
        settings.held_out,
        settings.seed,
        settings.support,
        keep(settings),
        settings.max_length,
        settings.batch_size,
    )
    return of_texts(base, texts, how, processes, console, lambda tokens: refuse_impossible(settings, base.head, tokens))
