"""Fuzzers of all that a user gives: options, variables, the settings file, adapters, records, stores, rows.

No case ends in a traceback or hangs: the command does what it was told, or says in one sentence why not. A run of each
is bounded and always draws the same cases; the long run, marked slow, draws 10,000 in all.
"""

import json
import os
import shutil
import string
from dataclasses import fields
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from pydantic.fields import FieldInfo

import moe_bias.cli as cli
import moe_bias.report.files as report_files
from helpers.fuzzing import (
    ODD_TEXTS,
    ODD_VALUES,
    damaged_tensors,
    ended,
    look_at,
    replace_file,
    run_cases,
    written_json,
)
from helpers.reports import policy
from helpers.saved import save_adapter, save_model

LONG_RUN = 10_000
ON_A_COMMAND_LINE = [text for text in ODD_TEXTS if "\0" not in text and "\ud800" not in text]
NUMBERS = ["0", "1", "2", "3", "7", "0.5", "1e-3", "100", "1e9", str(2**31), str(2**40), "1,2"]
WORDS = ["all", "auto:9", "free", "linear", "none", "cpu", "model", "adapter", "rows.jsonl", "train", "w5"]
LIGHT = {"params", "inspect", "verify", "report", "generate", "train sft", "extract", "eval", "tasks"}
"""Commands that are run to their end on the tiny model; of the others the settings are made."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a tiny model, an adapter on it, rows, problems and a feature store."""
    folder = tmp_path_factory.mktemp("ground")
    before = Path.cwd()
    os.chdir(folder)
    save_model(folder / "model")
    save_adapter(folder / "adapter", "model")
    rows = [{"question": f"w{n} w6", "answer": f"w{n + 1} w9"} for n in range(5, 12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "answers.json").write_text(json.dumps(policy()))
    look_at(ended(EXTRACT.split()))
    yield folder
    os.chdir(before)


@pytest.fixture
def empty_environment(ground, monkeypatch):
    """No variables, no settings file and no cache of the user's."""
    for name in [name for name in os.environ if name.startswith("MOE_BIAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(ground / "cache"))
    monkeypatch.setattr(cli, "build_parser", cache(cli.build_parser))
    return monkeypatch


EXTRACT = "extract --model model --data rows.jsonl --support auto:40 --output store --device cpu"
BASELINES = {
    "params": "params --model model",
    "tasks": "tasks general_points",
    "inspect": "inspect adapter",
    "verify": "verify store",
    "report": "report answers.json --output OUT",
    "generate": "generate w5 --model model --adapter adapter --max-new-tokens 2 --device cpu",
    "train sft": "train sft --model model --data rows.jsonl --support auto:40 --epochs 1 --device cpu --output OUT "
    "--no-keep-features",
    "extract": "extract --model model --data rows.jsonl --support auto:40 --device cpu --output OUT",
    "train rl": "train rl --output OUT",
    "sweep": "sweep --data rows.jsonl --grid num_experts=1,2 --output OUT",
    "arms": "arms --data rows.jsonl --output OUT",
    "compare": "compare --output OUT",
    "labels": "labels --data rows.jsonl --output OUT",
    "analyze": "analyze --adapter adapter --data rows.jsonl --output OUT",
    "inspect-text": "inspect-text --adapter adapter --prompt w5",
    "serve": "serve --adapters .",
    "eval": "eval --model model --data rows.jsonl --max-new-tokens 2 --device cpu --regrade --output OUT",
}
_number = count()


def baseline(words: str) -> list[str]:
    """Words of a command that would work, with an output folder of its own."""
    line = BASELINES.get(words, words)
    return [f"out-{next(_number)}" if word == "OUT" else word for word in line.split()]


class Still(cli.Command):
    """A command that only looks at its settings."""

    def run(self, settings):
        settings.model_dump(mode="json")


def without_work(command: cli.Command) -> cli.Command:
    """The command up to where its work would begin."""
    return Still(**{one.name: getattr(command, one.name) for one in fields(command)})


def only_light_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [command if command.words in LIGHT else without_work(command) for command in cli.COMMANDS]
    monkeypatch.setattr(cli, "COMMANDS", tuple(commands))


def some_option(random: Random, name: str, field: FieldInfo) -> list[str]:
    """The option with a value of its kind, or an odd one."""
    option, kind = "--" + name.replace("_", "-"), str(field.annotation)
    if field.annotation is bool:
        return [random.choice((option, "--no-" + option[2:]))]
    likely = NUMBERS if "int" in kind or "float" in kind or "ByteSize" in kind else WORDS
    likely = [str(choice) for choice in get_args(field.annotation)] if "Literal" in kind else likely
    value = random.choice(ON_A_COMMAND_LINE if random.random() < 0.4 else likely)
    return random.choice(([option, value], [f"{option}={value}"]))


def options_case(random: Random) -> list[str]:
    """A command with some options of its own, and values that may be odd."""
    command = random.choice([command for command in cli.COMMANDS if command.words != cli.LM_EVAL])
    words = baseline(command.words)
    options = {
        name: field
        for name, field in command.settings.model_fields.items()
        if name != "trust_remote_code" and "CliPositional" not in str(field.metadata)
    }
    for name in random.sample(sorted(options), min(random.choice((1, 1, 2, 3)), len(options))):
        words += some_option(random, name, options[name])
    if command.argument and random.random() < 0.1:
        words.append(random.choice(ON_A_COMMAND_LINE))
    return words


def toml_value(random: Random, value: object) -> str:
    """As TOML writes it, or about so."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(random, part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(random, part) for part in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def settings_case(folder: Path, monkeypatch: pytest.MonkeyPatch):
    names = sorted({name for command in cli.COMMANDS for name in command.settings.model_fields})

    def case(random: Random) -> list[str]:
        """A command under a settings file and variables of odd values."""
        for name in [name for name in os.environ if name.startswith("MOE_BIAS_")]:
            monkeypatch.delenv(name)
        odd = [*ODD_VALUES, *ODD_TEXTS]
        lines = [f"[{random.choice(sorted(cli.SECTIONS.keys))}]"] if random.random() < 0.9 else []
        lines += [
            f"{random.choice(names)} = {toml_value(random, random.choice(odd))}" for _ in range(random.randint(0, 2))
        ]
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
        act = random.randrange(10)
        if act == 0:
            text = bytes(random.randrange(256) for _ in range(40))
        elif act == 1:
            text = "".join(random.choice(string.printable) for _ in range(40)).encode()
        elif act == 2:
            text = b"a = " + b"[" * 50_000
        replace_file(folder / "moe-bias.toml", text)
        for _ in range(random.randint(0, 2)):
            monkeypatch.setenv(
                f"MOE_BIAS_{random.choice([*names, 'config']).upper()}", random.choice(ON_A_COMMAND_LINE)
            )
        command = random.choice([command for command in cli.COMMANDS if command.words != cli.LM_EVAL])
        return baseline(command.words)

    return case


def adapter_case(folder: Path):
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.copytree(folder / "adapter", folder / "damaged", dirs_exist_ok=True)

    def case(random: Random) -> list[str]:
        """A command on an adapter one of whose files is damaged."""
        is_config = random.random() < 0.6
        whole = json.dumps(config).encode()
        replace_file(folder / "damaged" / "adapter_config.json", written_json(random, config) if is_config else whole)
        replace_file(
            folder / "damaged" / "adapter_model.safetensors", weights if is_config else damaged_tensors(random, weights)
        )
        return ["inspect", "damaged"]

    return case


def record_case(folder: Path, paths: list[Path]):
    files = [path if path.is_file() else next(path.glob("*.json")) for path in paths]
    documents = [json.loads(path.read_text()) for path in files]

    def case(random: Random) -> list[str]:
        """A report of one damaged record."""
        replace_file(folder / "record" / "record.json", written_json(random, random.choice(documents)))
        return ["report", "record", "--output", "made-report"]

    (folder / "record").mkdir(exist_ok=True)
    return case


def store_case(folder: Path):
    shards = sorted((folder / "store").glob("shard-*"))
    shutil.copytree(folder / "store", folder / "damaged-store", dirs_exist_ok=True)
    contents = {path.name: path.read_bytes() for path in (folder / "store").iterdir() if path.is_file()}

    def case(random: Random) -> list[str]:
        """A command on a feature store one of whose files is damaged."""
        for name, content in contents.items():
            replace_file(folder / "damaged-store" / name, content)
        name = random.choice(["manifest.json", "manifest.json", "seconds.json", *(path.name for path in shards)])
        content = contents[name]
        damage = (
            damaged_tensors(random, content) if name.startswith("shard") else written_json(random, json.loads(content))
        )
        replace_file(folder / "damaged-store" / name, damage)
        if random.random() < 0.5:
            return ["verify", "damaged-store"]
        return baseline("train sft --model model --store damaged-store --epochs 1 --device cpu --output OUT")

    return case


ROWS = [
    {"question": "w5 w6", "answer": "w7 w8"},
    {"prompt": "w5 w6", "completion": "w7"},
    {"instruction": "w5", "input": "w6", "output": "w9"},
    {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
    {"prompt": [{"role": "user", "content": "w5"}], "completion": [{"role": "assistant", "content": "w6"}]},
    {"conversations": [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]},
]


def rows_case(folder: Path):
    def case(random: Random) -> list[str]:
        """A command on rows some of which are damaged."""
        kind = random.choice(ROWS)
        lines = [json.dumps(kind).encode() for _ in range(4)]
        lines[random.randrange(4)] = written_json(random, kind)
        replace_file(folder / "damaged.jsonl", b"\n".join(lines))
        return baseline("extract --model model --data damaged.jsonl --support auto:40 --device cpu --output OUT")

    return case


def numbers(bounded: int):
    """Of cases: the run of every day, and the part of the long run."""
    return pytest.mark.parametrize("number", [bounded, pytest.param(LONG_RUN // 6 + 1, marks=pytest.mark.slow)])


def some_are_refused(codes: list[int]) -> bool:
    """Whether the fuzzer drew cases of both kinds."""
    return 0 < codes.count(2) < len(codes)


@numbers(120)
def test_options(ground, empty_environment, number):
    only_light_commands(empty_environment)
    assert some_are_refused(run_cases(number, 0, options_case))


@numbers(200)
def test_settings_file_and_variables(ground, empty_environment, number):
    empty_environment.setattr(cli, "COMMANDS", tuple(map(without_work, cli.COMMANDS)))
    try:
        assert some_are_refused(run_cases(number, 0, settings_case(ground, empty_environment)))
    finally:
        (ground / "moe-bias.toml").unlink(missing_ok=True)


@numbers(120)
def test_adapter_files(ground, empty_environment, number):
    assert some_are_refused(run_cases(number, 0, adapter_case(ground)))


@numbers(16)
def test_records(ground, runs, empty_environment, number):
    """Figures are drawn once each, into the page."""
    for name in ("file_svg", "file_pdf"):
        empty_environment.setattr(report_files, name, lambda *_: b"")
    assert some_are_refused(run_cases(number, 0, record_case(ground, runs)))


@numbers(60)
def test_stores(ground, empty_environment, number):
    assert some_are_refused(run_cases(number, 0, store_case(ground)))


@numbers(60)
def test_rows(ground, empty_environment, number):
    assert some_are_refused(run_cases(number, 0, rows_case(ground)))
