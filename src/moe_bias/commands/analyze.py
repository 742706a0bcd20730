"""`moe-bias analyze`: what adapters do to the model on a text, in a folder that tables and reports read.

Each adapter is read on its own and leaves a file; `analysis.json` joins them (`analysis.record` says what is
in it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_bias.adapter.saved import adapter_folder
from moe_bias.analysis.record import FILE, FORMAT, adapter_record, checkpoint_record
from moe_bias.analysis.survey import Marks, mark, overlap, survey
from moe_bias.analysis.tally import ENTROPY_EDGES
from moe_bias.analysis.token_classes import vocabulary_classes
from moe_bias.commands.analysis_flips import answer_record, text_flips
from moe_bias.commands.analysis_table import print_analysis
from moe_bias.commands.analysis_text import Matter, opened
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.looking_settings import AnalyzeSettings
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted, damaged, read_json, shown
from moe_bias.progress import say
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.training.checkpoint import saved_layers
from moe_bias.training.run_folder import refuse_other_settings

FOLDER = "adapters"


def run(settings: AnalyzeSettings) -> None:
    """Reads the adapters that are not done yet, writes `analysis.json` and prints what it says.

    Raises UserError on adapters, texts or settings that cannot be used, and where the folder holds
    another analysis; Interrupted on Ctrl-C, saying how many adapters are done.
    """
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    folders = [adapter_folder(name) for name in settings.adapter]
    console = report_console()
    paths = [settings.output / FOLDER / f"{number}.json" for number in range(len(folders))]
    try:
        with opened(settings, console) as matter:
            marks = mark(matter.text, vocabulary_classes(matter.tokenizer, matter.head.vocab_size), settings.rho)
            for path, name, folder, layer in zip(paths, settings.adapter, folders, matter.layers, strict=True):
                if not path.is_file():
                    write_json(path, _adapter(matter, marks, layer, name, folder, settings))
            record = _record(matter, marks, settings) | {"adapters": [_read(path) for path in paths]}
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_so_far(paths, interrupt)) from interrupt
    write_json(settings.output / FILE, record)
    print_analysis(console, record)
    say(console, f"{FILE} is in {settings.output}.")


def _adapter(
    matter: Matter, marks: Marks, layer: MoEBiasLayer, name: str, folder: Path, settings: AnalyzeSettings
) -> dict[str, Any]:
    def decode(ids: Sequence[int]) -> str:
        text: str = matter.tokenizer.decode(list(ids))
        return text

    found = survey(layer, matter.head, matter.text, marks, settings.flips, settings.contexts, name)
    shared = overlap(matter.text, marks, found.adapted_entropy)
    series = list(_checkpoints(matter, marks, layer, folder)) if settings.checkpoints else []
    ground = matter.ground
    return {
        **adapter_record(name, layer, found, shared, series, settings.top, decode),
        "flips": text_flips(matter, layer, found.flips.moments, settings, decode),
        "answers": None if ground is None else answer_record(matter, ground, layer, marks, settings, decode),
    }


def _checkpoints(matter: Matter, marks: Marks, layer: MoEBiasLayer, folder: Path) -> Iterator[dict[str, Any]]:
    """Overlap and KL at each checkpoint of the run that made the adapter, where they are beside it."""
    earlier = copy.deepcopy(layer)
    for step, tensors in saved_layers(folder):
        earlier.load_state_dict(tensors)
        found = survey(earlier, matter.head, matter.text, marks, 0, 0, f"step {step}")
        yield checkpoint_record(step, found, overlap(matter.text, marks, found.adapted_entropy))


def _record(matter: Matter, marks: Marks, settings: AnalyzeSettings) -> dict[str, Any]:
    return {
        "kind": RecordKind.ANALYSIS,
        "format": FORMAT,
        "settings": settings.model_dump(mode="json"),
        "provenance": provenance(),
        "text": {
            "kind": matter.kind,
            "name": matter.name,
            "tokens": len(marks.entropy),
            "examples": marks.examples,
            "dropped": matter.dropped,
            "rho": marks.rho,
            "threshold": marks.threshold,
        },
        "entropy_edges": list(ENTROPY_EDGES),
    }


def _read(path: Path) -> dict[str, Any]:
    remedy = "remove it to read the adapter again"
    found = read_json(path, "file", remedy)
    if not isinstance(found, dict):
        raise damaged(f"file {str(path)!r}", f"it holds {shown(found)}", remedy)
    return found


def _so_far(paths: list[Path], interrupt: KeyboardInterrupt) -> str:
    if isinstance(interrupt, Interrupted):
        return str(interrupt)
    count = sum(path.is_file() for path in paths)
    return f"{count} of {len(paths)} adapters are done; the same command goes on"
