"""What is a user's mistake and what is a fault of ours, how long a sentence gets, and interrupts at any moment."""

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel

import moe_bias
from helpers.complaints import complaint, told
from helpers.fuzzing import ended, look_at, nested
from helpers.models import tiny_model
from helpers.saved import save_model, write_rows
from moe_bias import MoEBiasConfig
from moe_bias.cli import main
from moe_bias.commands import params
from moe_bias.commands.looking_settings import EvalSettings
from moe_bias.commands.training_settings import DemoSettings, TrainRLSettings
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import endless_sampling, in_days, machine_bytes, refuse_beyond_memory, refuse_endless_steps
from moe_bias.mistakes import UserError, as_kind, printable, read_json, shortened, shown, system_errors_about

pytestmark = pytest.mark.usefixtures("folder")
LONG = "x" * 300
OF_A_TERMINAL = re.compile(r"(?:^|[\s`(])--[a-z]|\b[Cc]ommands?\b")
NESTED = str({"a": [[*range(50)], {"b": [*range(50)]}]})


@pytest.mark.parametrize(
    ("sentence", "cut"),
    [
        ("it is short", "it is short"),
        (f"'{LONG}' is no file", f"'{'x' * 38}...{'x' * 37}' is no file"),
        (f'row is "it\'s {LONG}"; mend it', f'row is "it\'s {"x" * 33}...{"x" * 37}"; mend it'),
        (f"{LONG} has no rows", f"{'x' * 39}...{'x' * 38} has no rows"),
        (f"columns {['ab'] * 50}; needed", f"columns {str(['ab'] * 50)[:39]}...{str(['ab'] * 50)[-38:]}; needed"),
        (f"is {NESTED} here", f"is {NESTED[:39]}...{NESTED[-38:]} here"),
        ("a model's rows and the user's " * 4, "a model's rows and the user's " * 4),
        (f"'{'x' * 78}' fits", f"'{'x' * 78}' fits"),
    ],
)
def test_values_are_cut(sentence, cut):
    assert shortened(sentence) == cut
    assert str(UserError(sentence)) == cut


def test_what_cannot_be_written_down_is_named_by_its_type():
    assert shown(10**5000) == "a int too large to be written here"
    assert printable("a\x1b[31m\udce9\n") == "a\\x1b[31m\\udce9\\n"


OVER_LONG = "n" * 300
PLACES = {
    "too long": OVER_LONG,
    "below a file": "rows.jsonl/below",
    "no UTF-8": "caf\udce9",
    "root": "/",
    "above": "..",
    "memory": "/proc/self/mem",
    "endless": "/proc/kmsg",
    "device": "/dev/zero",
}
COMMANDS = {
    "report": "report PLACE --output out",
    "report to": "report rows.jsonl --output PLACE",
    "inspect": "inspect PLACE",
    "verify": "verify PLACE",
    "eval": "eval --model model --data PLACE --output out",
    "eval with": "eval --model model --data rows.jsonl --adapter PLACE --output out",
    "train": "train sft --model model --data PLACE --output out",
    "train on": "train sft --model model --store PLACE --output out",
    "train to": "train sft --model model --data rows.jsonl --support auto:9 --output rows.jsonl/PLACE",
    "support": "extract --model model --data rows.jsonl --support PLACE --output out",
    "model": "params --model PLACE",
    "generate": "generate w5 --model model --adapter PLACE",
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a tiny model and rows that can be trained on."""
    ground = tmp_path_factory.mktemp("ground")
    save_model(ground / "model")
    write_rows(ground / "rows.jsonl")
    return ground


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_places_are_one_sentence(command, place, ground, monkeypatch):
    monkeypatch.chdir(ground)
    ending = ended(COMMANDS[command].replace("PLACE", PLACES[place]).split())
    look_at(ending)
    assert ending.code == 2


def test_the_settings_file_may_have_an_odd_name_too(monkeypatch, capsys):
    monkeypatch.setenv("MOE_BIAS_CONFIG", OVER_LONG)
    assert complaint(capsys, "params") == f"'{'n' * 38}...{'n' * 37}' cannot be used: File name too long"


def fail_with(error):
    def fail(settings):
        raise error

    return fail


def test_what_the_system_says_of_another_path_is_a_fault_of_ours(monkeypatch, tmp_path):
    ours = FileNotFoundError(
        errno.ENOENT, "No such file or directory", str(Path(__file__).parent / "pages" / "lost.html")
    )
    monkeypatch.setattr(params, "model_sizes", fail_with(ours))
    with pytest.raises(FileNotFoundError):
        main(["params", "--model", str(tmp_path / "model")])


@pytest.mark.parametrize("named", ["mine", "mine/file/below/it", "--output=mine", "other,mine"])
def test_what_the_system_says_of_a_named_path_is_a_sentence(named, folder):
    with pytest.raises(UserError, match="mine/file' cannot be used: Permission denied"), system_errors_about([named]):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "mine" / "file"))


def test_a_full_disk_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(params, "model_sizes", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    assert complaint(capsys, "params") == "a file cannot be written: No space left on device; make room on the disk"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] not enough memory: you tried to allocate 9 B")],
)
def test_too_little_memory_is_a_sentence(error, monkeypatch, capsys):
    monkeypatch.setattr(params, "model_sizes", fail_with(error))
    assert complaint(capsys, "params").startswith("there is not enough memory (")


def test_documents_are_read_or_named(tmp_path):
    path = tmp_path / "record.json"
    for content in (b"", b"{", b"\xff", nested(100_000).encode(), b"9" * 5000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"record '.*record\.json' (is empty|is damaged|cannot be read)"):
            read_json(path, "record")
    with pytest.raises(
        UserError, match=r"record is damaged: a\.1: input should be a valid integer.*, not 'x'; mend it"
    ):
        as_kind(dict[str, list[int]], {"a": [1, "x"]}, "record", "mend it")


def test_a_reader_that_has_gone_is_no_fault(monkeypatch, capsys):
    """As `moe-bias generate ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(params, "model_sizes", lambda settings: pipe.write("x" * 100_000))
        assert main(["params"]) == 1
    os.close(writer)
    assert capsys.readouterr().err == ""


def interrupted_while_pooling(settings):
    """As where an interrupt ends the interpreter's thread pools while something still asks for them."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")  # noqa: B904


def test_an_error_in_the_course_of_an_interrupt_is_the_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(params, "model_sizes", interrupted_while_pooling)
    assert main(["params"]) == 130
    assert capsys.readouterr().err == "moe-bias: interrupted: nothing was saved\n"


@pytest.mark.parametrize("seconds", [0, 0.1, 0.4, 1.0])
def test_an_interrupt_at_any_moment_ends_with_130_and_its_sentence(seconds, model):
    # A shell may start its background jobs without interrupts; such a job's children have none either.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import moe_bias.__main__ as program; "
        "print('begun', flush=True); program.main(); import time; time.sleep(60)"
    )
    words = [sys.executable, "-c", code, "eval", "--model", model, "--task", "products", "--output", "out"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.count("moe-bias: interrupted: ") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"support": "text"}, "support is 'text': input should be a valid tuple"),
        ({"support": [True]}, "support is True: input should be a valid integer"),
        ({"support": 5}, "support is 5: input should be a valid tuple"),
        ({"vocab_size": "97"}, "vocab_size is '97': input should be a valid integer"),
        ({"vocab_size": 2**70}, "vocab_size is 1180591620717411303424: input should be less than 2147483648"),
        ({"num_experts": 10**12}, "num_experts is 1000000000000: input should be less than or equal to 1048576"),
        ({"num_experts": True}, "num_experts is True: input should be a valid integer"),
        ({"strength": 1e308}, r"strength is 1e\+308: input should be less than or equal to"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is \['a'\]: input should be a valid string"),
        ({"embedding_sample": {"a": 1}}, "embedding_sample is {'a': 1}: input should be a valid list"),
        ({"self": 1}, "the config of the adapter '.*' cannot be read: .*multiple values for argument 'self'"),
        ({"support": None, "num_experts": 2**20, "vocab_size": 2**31 - 1}, "would take .* TiB and this machine has"),
        ({"task_type": {}}, "the config of the adapter '.*' cannot be read: .*unhashable|Invalid task type"),
    ],
)
def test_configs_of_other_types_are_refused_by_us_and_through_peft(changes, sentence, adapter, capsys):
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if "vocab_size" not in changes or changes["vocab_size"] != 2**31 - 1:
        with pytest.raises(UserError, match=sentence):
            MoEBiasConfig.from_pretrained(adapter)
        with pytest.raises(ValueError, match=sentence):
            PeftModel.from_pretrained(tiny_model("llama"), adapter)
    assert re.search(sentence, complaint(capsys, "inspect", adapter))


@pytest.mark.parametrize("content", [nested(100_000), "{", "9" * 5000])
def test_config_files_that_are_no_json_are_refused_by_our_class(content, adapter):
    (Path(adapter) / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"config '.*' is damaged: it is not JSON"):
        MoEBiasConfig.from_pretrained(adapter)


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        (DemoSettings, {"epochs": 2**64}, f"epochs is {2**64}: at most 4,294,967,295 can be counted to"),
        (DemoSettings, {"batch_tokens": 10**30}, f"batch_tokens is {10**30}: at most 4,294,967,295 can be counted to"),
        (DemoSettings, {"seed": 2**32}, "seed is 4294967296: at most 4,294,967,295 can be counted to"),
        (DemoSettings, {"gate_alpha": 1e300}, "gate_alpha is 1e+300: at most 1e+30 can be computed with"),
        (
            DemoSettings,
            {"max_new_tokens": 2**21},
            "max_new_tokens is 2097152: input should be less than or equal to 1048576",
        ),
        (
            DemoSettings,
            {"sample_budget": "9999999TiB"},
            "sample_budget is '9999999TiB': a size is from 0 to 1,048,576.0 TiB",
        ),
        (
            DemoSettings,
            {"steps": 4_000_000_000},
            "4,000,000,000 steps of 48 problems, 4 answers each of 192 tokens are up to 147,456,000,000,000 tokens to "
            "sample, 468 years at 10,000 a second, and at most 1,000,000,000,000 can be asked for; ask for less",
        ),
        (DemoSettings, {"output": "caf\udce9"}, "output is 'caf\\udce9': it has a zero byte in it, or is not UTF-8"),
        (DemoSettings, {"output": "a\0b"}, "output is 'a\\x00b': it has a zero byte in it, or is not UTF-8"),
    ],
)
def test_numbers_that_no_run_could_use(settings, changes, sentence):
    assert told(settings, **changes) == sentence


@pytest.mark.parametrize(
    ("settings", "given", "name"),
    [
        (TrainRLSettings, {"output": "o"}, "train_problems"),
        (EvalSettings, {"output": "o", "task": "products"}, "limit"),
    ],
)
def test_problems_beyond_the_machines_memory(settings, given, name):
    there = machine_bytes()
    assert there is not None
    number = min(there // 512, 2**32 - 1)
    sentence = told(settings, **given, **{name: number})
    assert "problems would take" in sentence
    assert sentence.endswith("; ask for fewer")


def test_a_layer_beyond_the_machines_memory():
    config = LayerConfig(num_experts=2**20, expert_rank=64)
    # E (D + (1 + 2 r) D) + 2 = 2^20 * 130 * 2^16 + 2 parameters; four times each in float32 and the table twice.
    with pytest.raises(UserError, match=r"training 1,048,576 linear experts of rank 64 .* would take .* TiB and this"):
        MoEBiasLayer(config, 2**16, 97)


def test_estimates():
    assert in_days(86400) == "1 days"
    assert in_days(86400 * 3650) == "10 years"
    assert endless_sampling(10**12, "x", "y") is None
    refuse_endless_steps(10**9, "x", "y")
    with pytest.raises(UserError, match="x are 10,000,000,000 optimiser steps, 116 days at a millisecond each"):
        refuse_endless_steps(10**10, "x", "y")
    refuse_beyond_memory(1, "x", "y")
    with pytest.raises(UserError, match=r"x would take 909\.5 TiB and this machine has .*; y"):
        refuse_beyond_memory(1e15, "x", "y")


def test_supports_beyond_any_number_are_one_sentence(folder, model, capsys):
    write_rows(folder / "rows.jsonl")
    words = ["extract", "--model", model, "--data", "rows.jsonl", "--output", "o", "--device", "cpu", "--support"]
    for size in (10**30, "9" * 200):
        assert "is none of 'auto:M' with M from 1 to 97" in complaint(capsys, *words, f"auto:{size}")


def test_an_output_below_a_file_is_told_before_anything_is_extracted(folder, model, capsys):
    write_rows(folder / "rows.jsonl")
    words = [
        "train",
        "sft",
        "--model",
        model,
        "--data",
        "rows.jsonl",
        "--output",
        "rows.jsonl/below",
        "--features",
        "f",
    ]
    sentence = f"--output 'rows.jsonl/below' cannot be a folder: '{folder}/rows.jsonl' is a file"
    assert complaint(capsys, *words) == shortened(sentence)
    assert not os.path.exists("f")


def test_training_without_an_end_is_refused_before_anything_is_extracted(folder, model, capsys):
    write_rows(folder / "rows.jsonl")
    words = ["train", "sft", "--model", model, "--data", "rows.jsonl", "--output", "o", "--support", "auto:9"]
    words += ["--device", "cpu", "--epochs", str(2**32 - 1), "--features", "f"]
    assert "4,294,967,295 epochs over 12 tokens, 512 in a step, are 4,294,967,295 optimiser steps" in complaint(
        capsys, *words
    )
    assert not os.path.exists("f")


def said_of_a_terminal(path: Path) -> list[str]:
    """A file's texts, docstrings apart, that speak of options or commands."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [text for text in texts if isinstance(text, str) and " " in text and OF_A_TERMINAL.search(text)]


def test_no_sentence_of_the_library_speaks_of_options_or_commands():
    package = Path(moe_bias.__file__).parent
    own_words = {"commands", "serving", "cli.py", "__main__.py"}  # serving names options of vLLM's server
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in own_words]
    found = {str(path.relative_to(package)): said_of_a_terminal(path) for path in files}
    of_others = {"frozen.py", "gguf_files.py", "folder_lock.py"}  # pip, llama.cpp's tool, the command that holds a lock
    assert {name: texts for name, texts in found.items() if texts and name not in of_others} == {}
    assert said_of_a_terminal(package / "serving" / "requests.py")
