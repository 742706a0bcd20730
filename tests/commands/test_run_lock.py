"""The folder of a run: looked at before any work, and one run's alone as long as it goes on."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.complaints import complaint, told
from helpers.saved import write_rows
from moe_bias import folder_lock
from moe_bias.cli import COMMANDS
from moe_bias.commands.looking_settings import AnalyzeSettings, ReportSettings, VerifySettings
from moe_bias.commands.run_lock import held
from moe_bias.commands.training_settings import DemoSettings, ExtractSettings, TrainSFTSettings
from moe_bias.folder_lock import LOCK, NOTE
from moe_bias.mistakes import UserError

pytestmark = pytest.mark.usefixtures("folder")
FILES = ("record.json",)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


@contextmanager
def another(command: str, shared: bool = False):
    """Another process that holds the folder `out`; gives its number."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with held(Path("out"), command, FILES, shared):
                os.write(writer, b"held")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 4) == b"held"
        yield child
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def words_of(command: str, model: str) -> list[str]:
    write_rows(Path("rows.jsonl"))
    given = {
        "demo": "--output out",
        "extract": "--data rows.jsonl --output out",
        "train sft": "--data rows.jsonl --support auto:9 --features kept --output out",
        "train rl": "--task products --output out",
        "train draft": f"--data rows.jsonl --target {model} --output out",
        "sweep": "--data rows.jsonl --features kept --grid epochs=1 --output out",
        "arms": "--data rows.jsonl --features kept --output out",
        "compare": "--output out",
        "analyze": "--data rows.jsonl --features kept --adapter adapter --output out",
        "eval": "--data rows.jsonl --output out",
        "labels": "--data rows.jsonl --output out",
        "headroom": "--data rows.jsonl --features kept --output out",
        "report": "nothing --output out",
    }
    named = [] if command == "report" else ["--model", model]
    return [*command.split(), *given[command].split(), *named]


HOLDING = [command for command in COMMANDS if command.writes]


def test_every_command_with_a_folder_of_its_own_holds_it():
    """The page of inspect-text is one file."""
    with_output = {command.words for command in COMMANDS if "output" in command.settings.model_fields}
    assert with_output - {command.words for command in HOLDING} == {"inspect-text"}


@forks
@pytest.mark.parametrize("command", [command.words for command in HOLDING])
def test_a_folder_that_another_run_holds_is_refused_at_once(command, model, capsys):
    with another("train sft") as process:
        sentence = complaint(capsys, *words_of(command, model))
        assert sentence.startswith(f"--output 'out' is in use by moe-bias train sft, process {process} on ")
        assert sentence.endswith("; wait for its end, or name another folder")
    assert not Path("kept").exists()


@forks
def test_a_killed_process_holds_nothing(folder):
    with another("train sft"):
        pass
    assert {LOCK, NOTE} <= set(os.listdir("out"))
    with held(Path("out"), "eval", FILES):
        assert json.loads(Path("out", NOTE).read_text())["command"] == "eval"
    assert os.listdir("out") == []


@forks
def test_runs_of_compare_share_a_folder_and_nothing_else_does(folder):
    with another("compare", shared=True):
        with held(Path("out"), "compare", FILES, shared=True):
            pass
        with pytest.raises(UserError, match="is in use by "), held(Path("out"), "eval", FILES):
            pass
    with held(Path("out"), "eval", FILES):
        pass
    assert [command.words for command in COMMANDS if command.shared] == ["extract", "compare"]


@forks
def test_processes_of_one_launch_share_a_folder(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with another("train sft"):
        monkeypatch.setenv("RANK", "1")
        with held(Path("out"), "train sft", FILES):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="is in use by "), held(Path("out"), "train sft", FILES):
            pass


def test_nothing_is_left_of_a_run_that_wrote_nothing(folder):
    with held(Path("a/b"), "eval", FILES):
        assert Path("a/b", LOCK).exists()
    assert os.listdir() == []
    Path("there").mkdir()
    with held(Path("there/out"), "eval", FILES):
        Path("there/out/file").touch()
    assert os.listdir("there/out") == ["file"]


def test_a_file_system_without_locks_is_said(folder, monkeypatch, capsys):
    def refuse(*args, **options):
        raise folder_lock.sqlite3.OperationalError("disk I/O error")

    for way in ("acquire_write", "write_lock"):
        monkeypatch.setattr(folder_lock.ReadWriteLock, way, refuse)
    with held(Path("out"), "eval", FILES):
        Path("out/file").touch()
    assert capsys.readouterr().err.startswith("out can be given no lock by its file system: start no other run into it")
    assert Path("out/file").exists()


PLACES = ["rows.jsonl/out", *(["/proc/out"] if Path("/proc/self").exists() else [])]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", [command.words for command in HOLDING])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(command, place, model, capsys):
    words = [place if word == "out" else word for word in words_of(command, model)]
    assert complaint(capsys, *words).startswith(f"--output '{place}' cannot be ")
    assert not Path("kept").exists()


@pytest.mark.parametrize("command", HOLDING, ids=lambda command: command.words)
def test_a_folder_in_the_place_of_a_last_file_is_refused_before_any_work(command, model, capsys):
    for file in command.writes:
        Path("out", file).mkdir(parents=True)
        sentence = f"--output 'out' cannot be used: {file} in it is a folder, and is to be a file"
        assert complaint(capsys, *words_of(command.words, model)) == sentence
        Path("out", file).rmdir()
    assert not Path("kept").exists()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("page.html", "--output '.' cannot be used: page.json in it is a folder, and is to be a file"),
        ("rows.jsonl/page.html", "--output 'rows.jsonl' cannot be a folder: "),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_loaded(output, sentence, model, adapter, capsys):
    Path("page.json").mkdir()
    write_rows(Path("rows.jsonl"))
    words = ["inspect-text", "--adapter", adapter, "--prompt", "w5", "--model", "nowhere", "--output", output]
    assert complaint(capsys, *words).startswith(sentence)


def test_a_store_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder, capsys):
    write_rows(Path("rows.jsonl"))
    words = ["extract", "--data", "rows.jsonl", "--model", "nowhere", "--output", "rows.jsonl/store"]
    assert complaint(capsys, *words).startswith("--output 'rows.jsonl/store' cannot be a folder: ")


@pytest.mark.parametrize(
    ("settings", "given", "name"),
    [
        (DemoSettings, {}, "output"),
        (TrainSFTSettings, {"data": "d", "output": "o"}, "features"),
        (TrainSFTSettings, {"output": "o"}, "samples"),
        (ExtractSettings, {"data": "d"}, "output"),
        (AnalyzeSettings, {"adapter": ["a"], "task": "products"}, "output"),
        (VerifySettings, {}, "store"),
    ],
)
def test_an_empty_path_is_no_name_of_the_current_folder(settings, given, name):
    assert told(settings, **given, **{name: ""}) == f"{name} is '': it is empty; the current folder is '.'"
    assert settings(**given, **{name: "."} if name != "samples" else {"samples": "."})


def test_an_empty_option_and_variable_are_named(folder, monkeypatch, capsys):
    words = ["eval", "--task", "products"]
    expected = "is '': it is empty; the current folder is '.'"
    assert complaint(capsys, *words, "--output", "") == f"output from --output {expected}"
    monkeypatch.setenv("MOE_BIAS_OUTPUT", "")
    assert complaint(capsys, *words) == f"output from MOE_BIAS_OUTPUT {expected}"
    assert complaint(capsys, "report", "", "--output", "o").startswith("runs from --runs is '': it is empty")
    assert told(ReportSettings, runs=[""]) == f"runs {expected}"


def test_hidden_states_and_the_run_are_in_two_folders():
    sentence = told(TrainSFTSettings, data="d", output="o/./", features="o")
    assert sentence.startswith("--features o and --output o are one folder; give two")
