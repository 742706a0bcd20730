import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.complaints import complaint
from helpers.models import tiny_model
from helpers.saved import save_model
from helpers.stores import contents
from moe_bias.backbone import find_head
from moe_bias.cli import main
from moe_bias.config import ModelConfig
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import load_model

WORDS = [f"w{token}" for token in (*range(5, 20), *range(30, 60))]
"""Without those that begin with w2, which is a special token and is found within them."""


def write_rows(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + place * 3) % len(WORDS)] for place in range(length))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder, so that no settings file of the user's counts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder):
    return save_model(folder / "model")


@pytest.fixture
def data(folder):
    rows = ({"prompt": text(row, 2 + row % 4), "completion": text(row + 1, 3 + row % 5)} for row in range(20))
    return write_rows(folder / "rows.jsonl", *rows)


def arguments(model: str, data: str, output: str, *more: str) -> list[str]:
    return ["extract", "--model", model, "--data", data, "--output", output, "--device", "cpu", *more]


def extracted(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What the command prints."""
    assert main(arguments(*given)) == 0
    return capsys.readouterr().out


def test_extract_states_the_cost_makes_a_store_and_verify_finds_it_whole(model, data, capsys):
    printed = extracted(capsys, model, data, "store", "--support", "auto:30", "--shard-tokens", "30")
    assert "120 completion tokens of 20 examples, 190 tokens through the model; 4 shards, about" in printed
    assert "120 tokens kept in store" in printed
    assert "dropped" not in printed
    assert main(["verify", "store"]) == 0
    assert "4 shards, 120 tokens, " in (printed := capsys.readouterr().out)
    assert "every checksum fits." in printed
    store = FeatureStore.open("store")
    frozen, tokenizer = load_model(ModelConfig(model=model, device="cpu"))
    store.check(model_facts(frozen, find_head(frozen)[1], tokenizer))
    assert len(store.support) == 30
    assert 2 in store.support  # the end of a text
    assert store.at(slice(None)).hidden.dtype == torch.float32


def test_a_store_that_is_there_is_left_as_it_is(model, data, capsys):
    extracted(capsys, model, data, "store", "--support", "all")
    before = contents(Path("store"))
    printed = extracted(capsys, model, data, "store", "--support", "all")
    assert "hidden states found in store, " in printed
    assert "120 tokens kept in store" in printed
    assert contents(Path("store")) == before
    sentence = complaint(capsys, *arguments(model, data, "store", "--support", "auto:30"))
    assert sentence.startswith("'store' holds another feature store: its support is ")


def test_keep_top_says_what_was_dropped(model, data, capsys):
    printed = extracted(capsys, model, data, "store", "--support", "all", "--keep-top", "0.25", "--dtype", "bfloat16")
    assert "for the 25% of highest entropy" in printed
    manifest = FeatureStore.open("store").manifest
    assert manifest.tokens + manifest.dropped == 120
    share = f"{manifest.dropped / 120:.1%}"
    assert (
        f"{manifest.dropped} tokens ({share}) of base entropy below {manifest.threshold} nats were dropped" in printed
    )
    assert FeatureStore.open("store").at(slice(None)).hidden.dtype == torch.bfloat16


def test_parts_extracted_apart_have_one_support_and_join(model, data, capsys):
    for part in ("1/2", "2/2"):
        printed = extracted(capsys, model, data, part[0], "--support", "auto:30", "--shard", part)
        assert f"part {part}: 60 completion tokens of 10 examples" in printed
    assert len(FeatureStore.open("1", "2")) == 120
    extracted(capsys, model, data, "2-again", "--support", "1", "--shard", "2/2")
    assert len(FeatureStore.open("1", "2-again")) == 120
    extracted(capsys, model, data, "held-out", "--support", "1")
    assert FeatureStore.open("held-out").support.tolist() == FeatureStore.open("1").support.tolist()


def test_support_of_a_larger_vocabulary_is_refused(folder, model, data, capsys):
    extracted(capsys, model, data, "store", "--support", "all")
    smaller = folder / "smaller"
    save_model(smaller)
    tiny_model("llama", vocab_size=60).save_pretrained(smaller)
    sentence = complaint(capsys, *arguments(str(smaller), data, "new", "--support", "store"))
    assert sentence == "the support of store has id 96, outside the vocabulary of 60 tokens"


def test_rows_beyond_the_context_are_counted(folder, model, capsys):
    # The model has 128 positions, whatever --max-length says.
    data = write_rows(
        folder / "long.jsonl",
        {"prompt": text(0, 128), "completion": text(1, 2)},
        {"prompt": text(0, 126), "completion": text(1, 5)},
        {"prompt": text(0, 4), "completion": text(1, 5)},
    )
    printed = extracted(capsys, model, data, "store", "--support", "all")
    assert "1 of 3 rows are left out: no answer fits in 128 tokens" in printed
    assert "1 of 2 answers are cut: with their prompts they exceed 128" in printed
    store = FeatureStore.open("store")
    assert store.example.tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    assert store.position.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    sentence = complaint(capsys, *arguments(model, data, "short", "--support", "all", "--max-length", "4"))
    assert sentence.endswith(
        "long.jsonl has no usable row: each prompt fills the limit of 4 tokens; raise --max-length"
    )


def test_text_without_a_prompt_is_predicted_from_its_first_token(folder, model, capsys):
    data = write_rows(folder / "text.jsonl", {"prompt": "", "completion": "w5 w6 w7"})
    extracted(capsys, model, data, "store", "--support", "all")
    assert FeatureStore.open("store").token.tolist() == [6, 7, 2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no rows"),
        ('{"prompt": "w5", "completion": " "}', "row 1 of rows.jsonl: completion: the answer is empty"),
        (
            '{"text": "w5"}',
            "row 1 of rows.jsonl has columns ['text']; needed are messages, conversations, or one of prompt/completion",
        ),
        ('{"prompt": ', "line 1 of rows.jsonl is not JSON"),
    ],
)
def test_data_that_cannot_be_used(folder, content, sentence, capsys):
    (folder / "rows.jsonl").write_text(content)
    assert sentence in complaint(capsys, *arguments("nowhere", "rows.jsonl", "store"))


def test_a_chat_needs_a_template(folder, capsys):
    model = save_model(folder / "plain", chat_template=None)
    data = write_rows(folder / "rows.jsonl", {"question": "w5", "answer": "w6"})
    sentence = complaint(capsys, *arguments(model, data, "store"))
    assert "has no chat template; give plain text in prompt and completion columns" in sentence
    assert sentence.endswith("or write a template into its folder, as chat_template.jinja")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--shard", "3/2"], "shard from --shard is '3/2': write i/n with i from 1 to n, such as 2/4"),
        (["--shard", "half"], "shard from --shard is 'half': write i/n with i from 1 to n, such as 2/4"),
        (["--keep-top", "0"], "keep_top from --keep-top is '0': input should be greater than 0"),
        (["--dtype", "int8"], "dtype from --dtype is 'int8': input should be 'auto', 'float32' or 'bfloat16'"),
        (["--shard", "21/21", "--support", "all"], "part 21 of 21 of rows.jsonl is empty: it has 20 examples in all"),
        (["--support", "ids.json"], "support file ids.json: support id 97 is outside the vocabulary of 97 tokens"),
        (["--support", "auto:98"], "--support 'auto:98' is none of 'auto:M' with M from 1 to 97"),
        (["--support", "model"], "'model' holds no feature store: it has no manifest.json"),
    ],
)
def test_options_that_cannot_be_used(folder, model, data, option, sentence, capsys):
    (folder / "ids.json").write_text("[3, 97]")
    assert complaint(capsys, *arguments("model", "rows.jsonl", "store", *option)).startswith(sentence)
    assert not Path("store").exists()


def test_verify_names_the_damaged_shard(model, data, capsys):
    extracted(capsys, model, data, "store", "--support", "all", "--shard-tokens", "30")
    shard = Path("store") / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    sentence = complaint(capsys, "verify", "store")
    assert sentence.startswith("1 of 4 shards are damaged: 'store/shard-00001.safetensors'; make the store again")
    assert complaint(capsys, "verify", "model").startswith("'model' holds no feature store")


def test_extract_makes_a_damaged_shard_anew_and_leaves_the_others(model, data, capsys):
    given = model, data, "store", "--support", "all", "--shard-tokens", "30"
    extracted(capsys, *given)
    before = contents(Path("store"))
    written = {path.name: path.stat().st_mtime_ns for path in Path("store").iterdir()}
    damaged = bytearray(before["shard-00001.safetensors"])
    damaged[-5] ^= 8
    Path("store/shard-00001.safetensors").write_bytes(damaged)
    training = "train", "sft", "--model", model, "--store", "store", "--output", "adapter", "--device", "cpu"
    assert complaint(capsys, *training).startswith(
        "1 of 4 shards are damaged: 'store/shard-00001.safetensors'; make the store"
    )
    assert not Path("adapter").exists()
    assert "shards 1 of 4 are damaged or missing there, and made anew" in extracted(capsys, *given)
    assert contents(Path("store")) == before
    for number in (0, 2, 3):
        name = f"shard-0000{number}.safetensors"
        assert (Path("store") / name).stat().st_mtime_ns == written[name]
    assert main([*training, "--epochs", "1", "--support", "own"]) == 0


def test_a_process_killed_while_it_extracts_is_continued(folder, model, capsys):
    rows = ({"prompt": text(row, 30), "completion": text(row + 1, 60)} for row in range(60))
    given = [model, write_rows(folder / "rows.jsonl", *rows), "store", "--support", "auto:30", "--shard-tokens", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from moe_bias.cli import main; sys.exit(main())", *arguments(*given)],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not Path("store/shard-00005.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert complaint(capsys, "verify", "store").startswith("the feature store in 'store' is unfinished, ")
    extracted(capsys, *given)
    given[2] = "again"
    extracted(capsys, *given)
    assert contents(Path("store")) == contents(Path("again"))
