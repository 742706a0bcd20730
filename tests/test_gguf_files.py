"""Models from GGUF files: which file a name stands for, its one conversion, and what is told of damaged files."""

import json
import queue
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

import moe_bias as mb
from helpers.gguf_models import write_gguf
from helpers.models import HIDDEN, VOCABULARY, token_ids
from moe_bias import extras, frozen, gguf_files
from moe_bias.config import ModelConfig
from moe_bias.frozen import model_sizes, resolve_model
from moe_bias.limits import in_bytes
from moe_bias.mistakes import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 32}
"""Whole blocks of 32 weights, in which GGML quantises."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_BIAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, cache):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder / "tiny.gguf"


def refused(name: object, sentence: str) -> None:
    for use in (lambda: mb.load(str(name)), lambda: model_sizes(ModelConfig(model=str(name)))):
        with pytest.raises(UserError, match=sentence):
            use()


@pytest.mark.parametrize("tied", [False, True])
def test_model_of_a_file_is_the_one_that_was_written(file, tied):
    written = write_gguf(file, tie_word_embeddings=tied, leave_out="lm_head" if tied else "")
    base = mb.load(file)
    assert torch.equal(base.model(token_ids()).logits, written(token_ids()).logits)
    assert (base.head.hidden_size, base.head.vocab_size) == (HIDDEN, VOCABULARY)
    text = "<s>abba</s>"
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text
    assert base.tokenizer("ab").input_ids == [VOCABULARY - 3]
    assert base.tokenizer.eos_token_id == 2
    assert base.tokenizer.chat_template


def test_quantised_weights_are_nearly_those_that_were_written(file):
    written = write_gguf(file, kind=GGMLQuantizationType.Q8_0, **SIZES)
    for name, weight in mb.load(file).model.state_dict().items():
        wanted = written.state_dict()[name]
        assert (weight - wanted).abs().max() <= wanted.abs().max() / 127


def test_file_is_converted_once_and_found_by_its_content(file, tmp_path, cache, monkeypatch, capsys):
    write_gguf(file)
    folder = resolve_model(str(file))
    said = capsys.readouterr().err
    assert said.startswith(f"Converting {file} once, to ")
    assert Path(folder).name == "tiny"
    assert Path(folder).is_relative_to(cache / "gguf")
    monkeypatch.setattr(gguf_files, "convert", None)
    shutil.copy(file, tmp_path / "copy.gguf")
    for name in (file, file.parent, tmp_path / "copy.gguf"):
        assert resolve_model(str(name)) == folder
    assert capsys.readouterr().err == ""


def test_another_file_of_the_same_name_is_another_model(file):
    write_gguf(file)
    first = resolve_model(str(file))
    write_gguf(file, hidden_size=32)
    assert resolve_model(str(file)) != first
    assert mb.load(file).head.hidden_size == 32


def test_sizes_need_no_conversion(file, cache):
    written = write_gguf(file)
    sizes = (HIDDEN, VOCABULARY, written.num_parameters())
    assert model_sizes(ModelConfig(model=str(file))) == sizes
    assert not cache.exists()
    resolve_model(str(file))
    assert model_sizes(ModelConfig(model=str(file))) == sizes


def test_folder_with_a_config_is_a_model_of_transformers(file, tmp_path):
    write_gguf(file)
    shutil.copytree(resolve_model(str(file)), tmp_path / "both")
    shutil.copy(file, tmp_path / "both")
    assert resolve_model(str(tmp_path / "both")) == str(tmp_path / "both")


def test_who_comes_while_a_file_is_converted_waits_for_it(file, monkeypatch):
    said = queue.Queue()

    def slow(file, target):
        assert "Another process is converting" in said.get(timeout=60)
        target.mkdir()

    write_gguf(file)
    monkeypatch.setattr(gguf_files, "convert", slow)
    monkeypatch.setattr(gguf_files, "say", lambda console, sentence: "once, to" in sentence or said.put(sentence))
    with ThreadPoolExecutor(2) as both:
        folders = set(both.map(resolve_model, [str(file)] * 2))
    assert [Path(folder).name for folder in folders] == ["tiny"]


def test_adapter_names_the_converted_model_which_loads_by_itself(file, tmp_path):
    from peft import AutoPeftModelForCausalLM

    write_gguf(file)
    base = mb.load(file)
    data = mb.extract(base, [{"question": letter, "answer": letter * 9} for letter in "abcd"], support="all")
    layer, _ = mb.train_sft(base, data, mb.SFTConfig(epochs=1))
    mb.save(layer, tmp_path / "adapter", base)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolve_model(str(file))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_names_that_stand_for_no_file_are_told(file):
    refused(file, "tiny.gguf' cannot be loaded: there is no such file")
    file.write_bytes(b"PK\x03\x04 and so on")
    refused(file, "is a file, and no GGUF file, which begins with the letters GGUF; name such a file, or a folder")
    write_gguf(file)
    shutil.copy(file, file.with_name("other.gguf"))
    refused(file.parent, "is a folder with 2 GGUF files, other.gguf, tiny.gguf; name one of them")


def test_parts_of_a_split_file_are_refused(file):
    for name in ("big-00001-of-00003.gguf", "big-00002-of-00003.gguf"):
        write_gguf(file.with_name(name))
    sentence = "is part 1 of 3 of a split GGUF file, .*: llama-gguf-split --merge"
    refused(file.with_name("big-00001-of-00003.gguf"), sentence)
    refused(file.parent, sentence)
    write_gguf(file, values={"split.count": 3})
    refused(file, "is one of 3 parts of a split GGUF file")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_1, GGMLQuantizationType.I8])
def test_type_that_cannot_be_dequantised_is_named_with_its_first_tensor(file, kind):
    write_gguf(file, odd_kind=kind)
    refused(
        file,
        rf"has tensors of {kind.name} \(GGML's type {int(kind)}\), the first of them 'token_embd.weight', which "
        "cannot be dequantised; take the model in another quantisation",
    )


def test_type_that_nobody_knows_is_named_by_its_number(file):
    write_gguf(file, odd_kind=GGMLQuantizationType.Q8_1)
    content = file.read_bytes()
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    file.write_bytes(content[:place] + struct.pack("<I", 4321) + content[place + 4 :])
    refused(file, "has tensors of GGML's type 4321, the first of them 'token_embd.weight'")


def test_unknown_architecture_is_named(file):
    write_gguf(file, architecture="transmogrifier")
    refused(file, r"transformers 5\.\d+\.\d+ cannot read a GGUF file of architecture 'transmogrifier' \(.*; name a")


def test_cut_file_is_told_wherever_it_was_cut(file):
    write_gguf(file)
    whole = file.read_bytes()
    for kept in (5, 30, 200, 900, 2000, len(whole) // 2, len(whole) - 4):
        file.write_bytes(whole[:kept])
        refused(file, r"tiny.gguf' is cut off( or damaged: its header has no end|: it has [\d,]+ bytes, and)")


def test_counts_that_no_file_holds_are_damage(file):
    write_gguf(file)
    content = bytearray(file.read_bytes())
    for place in (8, 16, content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8):
        damaged = content.copy()
        damaged[place : place + 8] = struct.pack("<Q", 2**60)
        file.write_bytes(damaged)
        refused(file, "is cut off or damaged: its header has no end; fetch it anew")


def test_missing_weights_are_not_made_up(file):
    write_gguf(file, leave_out="q_proj.weight")
    with pytest.raises(UserError, match=r"has no weights for model\.layers\.0\.self_attn\.q_proj\.weight and 1 more"):
        mb.load(file)


def test_missing_package_is_named(file, monkeypatch):
    write_gguf(file)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    refused(file, r"reading a GGUF file needs gguf, which is not installed: pip install 'moe-bias\[gguf\]'")


def test_disk_without_room_is_told_before_anything_is_read(file, cache, monkeypatch):
    write_gguf(file)
    usage = shutil.disk_usage(file)
    monkeypatch.setattr(gguf_files.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=rf"takes {in_bytes(4 * 8395)} in float32 and .* has 100 B left; make room"):
        mb.load(file)


def test_interrupted_conversion_leaves_nothing(file, cache, monkeypatch):
    write_gguf(file)
    monkeypatch.setattr(frozen.AutoModelForCausalLM, "from_pretrained", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        mb.load(file)
    assert [path.name for path in (cache / "gguf").glob("*/*")] == [".lock"]


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt
