"""The command `moe-bias`: its subcommands, their options, and what it says when something goes wrong.

Nothing here imports torch: each command imports what it needs when it runs, so that `--help` is quick.

Exit codes: 0; 2 for a user's mistake, told in one sentence on standard error; 130 after an
interrupt, with a sentence of what was saved; 1 where nobody reads standard output any more. Anything else is a
fault of the program and shows its traceback. What the system says of a path that the user named is a mistake (see
`mistakes`), and so is work that the machine's memory does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper
from typing import Any, NoReturn

from pydantic_settings import CliSettingsSource

from moe_bias.commands.draft_settings import TrainDraftSettings
from moe_bias.commands.headroom_settings import HeadroomSettings
from moe_bias.commands.label_settings import LabelsSettings
from moe_bias.commands.looking_settings import (
    AnalyzeSettings,
    ChatSettings,
    EvalSettings,
    GenerateSettings,
    InspectSettings,
    InspectTextSettings,
    LmEvalSettings,
    ParamsSettings,
    ReportSettings,
    ServeSettings,
    TasksSettings,
    VerifySettings,
)
from moe_bias.commands.sources import Sections, as_typed, options_on, read
from moe_bias.commands.training_settings import (
    ArmsSettings,
    CompareSettings,
    DemoSettings,
    ExtractSettings,
    SweepSettings,
    TrainRLSettings,
    TrainSFTSettings,
)
from moe_bias.config import Config
from moe_bias.mistakes import (
    Interrupted,
    UserError,
    interrupt_behind,
    printable,
    reason_of,
    shortened,
    system_errors_about,
)
from moe_bias.variables import PREFIX

PROGRAM = "moe-bias"
LM_EVAL = "lm-eval"
SERVE = "serve"
USER_ERROR = 2
INTERRUPTED = 130
NOBODY_READS = 1
"""As rich ends a program whose reader has gone, such as `head`."""
_OUT_OF_MEMORY = re.compile("not enough memory|out of memory|can't allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Command:
    """One subcommand: its words, its settings, the module of `commands` that runs it, its positional argument if any.

    `writes` are the files that end a run in its folder, `--output`, which is then one run's as long as it goes on; or,
    where it is `shared`, of several runs of this command.
    """

    words: str
    settings: type[Config]
    module: str
    argument: str = ""
    writes: tuple[str, ...] = ()
    shared: bool = False

    @property
    def section(self) -> str:
        """The section of its own in the settings file."""
        return self.words.rpartition(" ")[2]

    def run(self, settings: Config) -> None:
        """Runs it, or says what it would take."""
        module = "dry_run" if is_dry(settings) else self.module
        importlib.import_module(f"moe_bias.commands.{module}").run(settings)


def is_dry(settings: Config) -> bool:
    """Whether the command is only to be worked out: it then writes nothing."""
    return bool(getattr(settings, "dry_run", False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with these arguments (default: the process's own); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _print_anything()
    try:
        with system_errors_about([*words, *_variables()]):
            if is_passed_on(words):
                importlib.import_module("moe_bias.commands.harness").run(words[1:])
            else:
                _run(*settings_of(words))
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code, sentence = _ending(error)
        if code is None:
            raise
        return _exit_with(code, sentence)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each subcommand's options come from its settings class."""
    parser = _Parser(prog=PROGRAM, usage=f"{PROGRAM} [options] COMMAND", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version(PROGRAM)}")
    groups = {"": _group(parser)}
    for command in COMMANDS:
        group, _, word = command.words.rpartition(" ")
        if group not in groups:
            groups[group] = _group(_subparser(groups[""], group, "COMMAND", GROUPS[group]))
        leaf = _subparser(groups[group], word, command.argument, _summary(command.settings), group)
        leaf.set_defaults(command=command, options=options_on(leaf, command.settings))
    return parser


def is_passed_on(words: Sequence[str]) -> bool:
    """Whether what follows the first word is for the lm-evaluation-harness to read."""
    return words[:1] == [LM_EVAL] and (len(words) == 1 or not {*words[1:]} <= {"-h", "--help"})


def split_at_dashes(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The words of this program, and those after `--` where they are for vLLM's server to read."""
    if words[:1] != [SERVE] or "--" not in words:
        return words, ()
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _group(parser: argparse.ArgumentParser) -> Any:
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _subparser(group: Any, word: str, argument: str, summary: str, parent: str = "") -> argparse.ArgumentParser:
    usage = " ".join(part for part in (PROGRAM, parent, word, "[options]", argument) if part)
    parser: argparse.ArgumentParser = group.add_parser(word, usage=usage, help=summary, description=summary)
    return parser


def settings_of(words: Sequence[str]) -> tuple[Command, Config]:
    """The command of these words and its settings, with those of variables and the settings file.

    Raises UserError on settings that cannot be; exits with 2 on words that no command takes.
    """
    own, passed_on = split_at_dashes(words)
    given = vars(build_parser().parse_args(own))
    if passed_on:  # as JSON, or commas and brackets in them would be read as parts of a list
        given["arguments"] = json.dumps(passed_on)
    command: Command = given.pop("command")
    options: CliSettingsSource[Any] = given.pop("options")
    with _as_typed(command):
        return command, read(command.settings, SECTIONS, options, given)


def _run(command: Command, settings: Config) -> None:
    # These pass between our dependencies; someone at a terminal can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    with _as_typed(command), system_errors_about(settings.texts()), _folder_held(command, settings):
        command.run(settings)


@contextmanager
def _as_typed(command: Command) -> Iterator[None]:
    """What the library says of a field is said of the command's option, what it says of a call of the command."""
    try:
        yield
    except (UserError, Interrupted) as error:
        raise type(error)(as_typed(str(error), command.settings.model_fields)) from error


def _folder_held(command: Command, settings: Any) -> AbstractContextManager[None]:
    """The run's folder, where the command has one, for this run alone."""
    if not command.writes or settings.output is None or is_dry(settings):
        return nullcontext()
    from moe_bias.commands.run_lock import held

    return held(settings.output, command.words, command.writes, command.shared)


def _ending(error: BaseException) -> tuple[int | None, str]:
    """Exit code and sentence after an error; no code for a fault of the program."""
    interrupt = interrupt_behind(error)
    if interrupt is not None:
        saved = str(interrupt) if isinstance(interrupt, Interrupted) else "nothing was saved"
        return INTERRUPTED, f"interrupted: {saved}"
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return NOBODY_READS, ""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        remedy = "lower what sizes it, such as a batch or the experts, and run it again"
        return USER_ERROR, f"there is not enough memory ({reason_of(error)}); {remedy}"
    return None, ""


def _variables() -> list[str]:
    return [value for name, value in os.environ.items() if name.startswith(PREFIX)]


def _print_anything() -> None:
    """What the terminal's encoding lacks, and what is no text at all, is written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed; what is left for it then goes nowhere."""
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _summary(settings: type[Config]) -> str:
    return (settings.__doc__ or "").strip().splitlines()[0]


def _exit_with(code: int, sentence: str) -> int:
    if sentence:
        sys.stderr.write(f"{PROGRAM}: {printable(' '.join(sentence.split()))}\n")
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, where argparse would print the usage first."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        words = printable(" ".join(shortened(message).split()))
        self.exit(USER_ERROR, f"{PROGRAM}: {words}; see {self.usage_words()} --help\n")

    def usage_words(self) -> str:
        """The command itself, without its arguments."""
        return str(self.usage).partition(" [")[0]


_DESCRIPTION = "Adapt a frozen language model at its output: entropy-gated, routed logit biases."
_ADAPTER = ("record.json", "adapter_model.safetensors", "adapter_config.json")
GROUPS = {"train": "Train an adapter."}
COMMANDS = (
    Command("demo", DemoSettings, "demo", writes=_ADAPTER),
    Command("train sft", TrainSFTSettings, "train_sft", writes=_ADAPTER),
    Command("train rl", TrainRLSettings, "train_rl", writes=_ADAPTER),
    Command("train draft", TrainDraftSettings, "train_draft", writes=_ADAPTER),
    # of two extractions into one store the second waits, which the store sees to itself
    Command("extract", ExtractSettings, "extract", writes=("manifest.json",), shared=True),
    Command("verify", VerifySettings, "verify", argument="STORE"),
    Command("tasks", TasksSettings, "tasks", argument="[NAME]"),
    Command("headroom", HeadroomSettings, "headroom", writes=("record.json",)),
    Command("sweep", SweepSettings, "sweep", writes=("table.json",)),
    Command("arms", ArmsSettings, "arms", writes=("table.json",)),
    Command("compare", CompareSettings, "compare", writes=("table.json",), shared=True),
    Command("labels", LabelsSettings, "labels", writes=("record.json",)),
    Command("analyze", AnalyzeSettings, "analyze", writes=("analysis.json",)),
    Command("eval", EvalSettings, "evaluate", writes=("samples.jsonl", "record.json")),
    Command(LM_EVAL, LmEvalSettings, "harness", argument="ARGUMENTS"),
    Command(SERVE, ServeSettings, "serve", argument="[-- ARGUMENTS]"),
    Command("chat", ChatSettings, "chat"),
    Command("generate", GenerateSettings, "generate", argument="PROMPT"),
    Command("params", ParamsSettings, "params"),
    Command("inspect", InspectSettings, "inspect_adapter", argument="ADAPTER"),
    Command("inspect-text", InspectTextSettings, "inspect_text"),
    Command("report", ReportSettings, "report", argument="RUN...", writes=("report.md", "report.html")),
)
SECTIONS = Sections({command.section: command.settings for command in COMMANDS})
