"""The command `moe-bias`: its subcommands, their options, and what it says when something goes wrong.

Nothing here imports torch: each command imports what it needs when it runs, so that `--help` is quick.

Exit codes: 0; 2 for a user's mistake, told in one sentence on standard error; 130 after an
interrupt, with a sentence of what was saved; 1 where nobody reads standard output any more. Anything else is a
fault of the program and shows its traceback. What the system says of a path that the user named is a mistake (see
`mistakes`), and so is work that the machine's memory does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from moe_bias.config import (
    ENV_PREFIX,
    AnalyzeSettings,
    ArmsSettings,
    CompareSettings,
    DemoSettings,
    EvalSettings,
    ExtractSettings,
    GenerateSettings,
    InspectSettings,
    InspectTextSettings,
    Interrupted,
    LmEvalSettings,
    ParamsSettings,
    ReportSettings,
    ServeSettings,
    Settings,
    SweepSettings,
    TrainRLSettings,
    TrainSFTSettings,
    UserError,
    VerifySettings,
    describe_error,
    describe_unreadable,
)
from moe_bias.mistakes import interrupt_behind, printable, reading, reason_of, shortened, system_errors_about

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
    """One subcommand: its words, its positional argument if any, its settings, and what runs it.

    `writes` are the files that end a run in its folder, `--output`, which is then one run's as long as it goes on; or,
    where it is `shared`, of several runs of this command.
    """

    words: str
    settings: type[Settings]
    run: Callable[[Any], None]
    argument: str = ""
    writes: tuple[str, ...] = ()
    shared: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with these arguments (default: the process's own); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _print_anything()
    try:
        with system_errors_about([*words, *_variables()]):
            if is_passed_on(words):
                _lm_eval(words[1:])
            else:
                own, passed_on = split_at_dashes(words)
                _run(build_parser().parse_args(own), passed_on)
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
        source: CliSettingsSource[Any] = CliSettingsSource(command.settings, root_parser=leaf, cli_parse_args=False)
        leaf.set_defaults(command=command, source=source)
    return parser


def is_passed_on(words: Sequence[str]) -> bool:
    """Whether what follows the first word is for the lm-evaluation-harness to read."""
    return words[:1] == [LM_EVAL] and not {*words[1:]} <= {"-h", "--help"}


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


def _run(arguments: argparse.Namespace, passed_on: Sequence[str]) -> None:
    given = vars(arguments)
    if passed_on:  # as JSON, or commas and brackets in them would be read as parts of a list
        given["arguments"] = json.dumps(passed_on)
    command: Command = given.pop("command")
    source: CliSettingsSource[Any] = given.pop("source")
    settings = _settings(command.settings, source, given)
    # These pass between our dependencies; someone at a terminal can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    with system_errors_about(settings.texts()), _folder_held(command, settings):
        command.run(settings)


def _folder_held(command: Command, settings: Any) -> AbstractContextManager[None]:
    """The run's folder, where the command has one, for this run alone."""
    if not command.writes:
        return nullcontext()
    from moe_bias.commands.run_lock import held

    return held(settings.output, command.words, command.writes, command.shared)


def _settings(cls: type[Settings], source: CliSettingsSource[Any], given: Mapping[str, Any]) -> Settings:
    """The settings of this run. Raises UserError naming where a bad value came from."""
    try:
        with reading("the command line", SettingsError):
            words = source(parsed_args=dict(given))
        return cls(_cli_settings_source=words)
    except ValidationError as error:
        raise UserError(describe_error(error, given)) from error
    except SettingsError as error:
        raise UserError(describe_unreadable(error)) from error


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
    return [value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)]


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


def _summary(settings: type[Settings]) -> str:
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


def _demo(settings: DemoSettings) -> None:
    from moe_bias.commands import demo

    demo.run(settings)


def _train_sft(settings: TrainSFTSettings) -> None:
    from moe_bias.commands import train_sft

    train_sft.run(settings)


def _train_rl(settings: TrainRLSettings) -> None:
    from moe_bias.commands import train_rl

    train_rl.run(settings)


def _extract(settings: ExtractSettings) -> None:
    from moe_bias.commands import extract

    extract.run(settings)


def _verify(settings: VerifySettings) -> None:
    from moe_bias.commands import verify

    verify.run(settings)


def _sweep(settings: SweepSettings) -> None:
    from moe_bias.commands import sweep

    sweep.run(settings)


def _arms(settings: ArmsSettings) -> None:
    from moe_bias.commands import arms

    arms.run(settings)


def _compare(settings: CompareSettings) -> None:
    from moe_bias.commands import compare

    compare.run(settings)


def _analyze(settings: AnalyzeSettings) -> None:
    from moe_bias.commands import analyze

    analyze.run(settings)


def _eval(settings: EvalSettings) -> None:
    from moe_bias.commands import evaluate

    evaluate.run(settings)


def _lm_eval(arguments: Sequence[str]) -> None:
    from moe_bias.commands import harness

    harness.run(arguments)


def _serve(settings: ServeSettings) -> None:
    from moe_bias.commands import serve

    serve.run(settings)


def _generate(settings: GenerateSettings) -> None:
    from moe_bias.commands import generate

    generate.run(settings)


def _params(settings: ParamsSettings) -> None:
    from moe_bias.commands import params

    params.run(settings)


def _inspect(settings: InspectSettings) -> None:
    from moe_bias.commands import inspect_adapter

    inspect_adapter.run(settings)


def _inspect_text(settings: InspectTextSettings) -> None:
    from moe_bias.commands import inspect_text

    inspect_text.run(settings)


def _report(settings: ReportSettings) -> None:
    from moe_bias.commands import report

    report.run(settings)


_DESCRIPTION = "Adapt a frozen language model at its output: entropy-gated, routed logit biases."
_ADAPTER = ("record.json", "adapter_model.safetensors", "adapter_config.json")
GROUPS = {"train": "Train an adapter."}
COMMANDS = (
    Command("demo", DemoSettings, _demo, writes=_ADAPTER),
    Command("train sft", TrainSFTSettings, _train_sft, writes=_ADAPTER),
    Command("train rl", TrainRLSettings, _train_rl, writes=_ADAPTER),
    # of two extractions into one store the second waits, which the store sees to itself
    Command("extract", ExtractSettings, _extract, writes=("manifest.json",), shared=True),
    Command("verify", VerifySettings, _verify, argument="STORE"),
    Command("sweep", SweepSettings, _sweep, writes=("table.json",)),
    Command("arms", ArmsSettings, _arms, writes=("table.json",)),
    Command("compare", CompareSettings, _compare, writes=("table.json",), shared=True),
    Command("analyze", AnalyzeSettings, _analyze, writes=("analysis.json",)),
    Command("eval", EvalSettings, _eval, writes=("samples.jsonl", "record.json")),
    Command(LM_EVAL, LmEvalSettings, lambda settings: _lm_eval([]), argument="ARGUMENTS"),
    Command(SERVE, ServeSettings, _serve, argument="[-- ARGUMENTS]"),
    Command("generate", GenerateSettings, _generate, argument="PROMPT"),
    Command("params", ParamsSettings, _params),
    Command("inspect", InspectSettings, _inspect, argument="ADAPTER"),
    Command("inspect-text", InspectTextSettings, _inspect_text),
    Command("report", ReportSettings, _report, argument="RUN...", writes=("report.md", "report.html")),
)
