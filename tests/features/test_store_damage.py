"""Feature stores that are not what was written: each is refused in a sentence, and none is trained on."""

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from helpers.models import HIDDEN, VOCABULARY, tiny_model
from helpers.stores import SUPPORT, contents, corpus_of, make_store, plan_of
from moe_bias.backbone import find_head
from moe_bias.features.build import extract
from moe_bias.features.checked import CHECKED
from moe_bias.features.manifest import MANIFEST, SECONDS, UNFINISHED
from moe_bias.features.store import FeatureStore
from moe_bias.mistakes import UserError

SHARD, OTHER = "shard-00001.safetensors", "shard-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    make_store(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def grow_old(folder: Path) -> None:
    """As if the shards had been written an hour ago, so that it is written down which are whole."""
    for path in folder.glob("shard-*"):
        moment = path.stat().st_mtime - 3600
        os.utime(path, (moment, moment))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))


def of_another_store(folder: Path) -> None:
    """A shard of the same sizes, of another corpus."""
    lengths = [(len(example.prompt_ids), len(example.completion_ids)) for example in corpus_of().examples]
    corpus = corpus_of(seed=0)
    for example, (prompt, completion) in zip(corpus.examples, lengths, strict=True):
        example.prompt_ids[:], example.completion_ids[:] = [5] * prompt, [6] * completion
    make_store(folder.parent / "other", corpus)
    content = (folder.parent / "other" / SHARD).read_bytes()
    assert len(content) == (folder / SHARD).stat().st_size
    (folder / SHARD).write_bytes(content)


def swap(folder: Path) -> None:
    (folder / SHARD).rename(folder / "third")
    (folder / OTHER).rename(folder / SHARD)
    (folder / "third").rename(folder / OTHER)


def link_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    shutil.copy(folder / OTHER, elsewhere)
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(elsewhere)


def link_to_nothing(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("nowhere")


def pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def cut_short(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-8])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda folder: flip_a_bit(folder / SHARD),
    "a shard of another store": of_another_store,
    "swapped shards": swap,
    "a link elsewhere": link_elsewhere,
    "a link to nothing": link_to_nothing,
    "a pipe": pipe,
    "cut short": cut_short,
    "empty": lambda folder: (folder / SHARD).write_bytes(b""),
    "missing": lambda folder: (folder / SHARD).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_named_and_made_anew(made, folder, damage, finished):
    FeatureStore.open(folder)
    DAMAGE[damage](folder)
    with pytest.raises(UserError, match=rf"[12] of \d shards are damaged: '.*{SHARD}'.*; make the store again"):
        FeatureStore.open(folder)
    if not finished:
        (folder / MANIFEST).rename(folder / UNFINISHED)
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    make_store(folder)
    assert {name: content for name, content in contents(folder).items() if name != "third"} == contents(made)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert not (folder / SHARD).is_symlink()
    FeatureStore.open(folder)


def test_a_folder_in_a_shards_place_is_told(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    with pytest.raises(UserError, match="1 of 4 shards are damaged"):
        FeatureStore.open(folder)
    with pytest.raises(UserError, match=rf"{SHARD} cannot be written .*: 3 of 4 shards are whole"):
        make_store(folder)


def test_shards_that_were_found_whole_are_not_read_again_until_they_change(folder, monkeypatch):
    read, opened = [], Path.open

    def open_it(path, *choices, **named):
        if path.suffix == Path(SHARD).suffix:
            read.append(path.name)
        return opened(path, *choices, **named)

    monkeypatch.setattr(Path, "open", open_it)
    count = len(FeatureStore.open(folder).manifest.shards)
    grow_old(folder)
    for expected in (count, 0):
        read.clear()
        FeatureStore.open(folder)
        assert len(read) == expected
    os.utime(folder / SHARD, (time.time() - 1800,) * 2)
    read.clear()
    FeatureStore.open(folder)
    assert read == [SHARD]
    read.clear()
    FeatureStore.open(folder, anew=True)
    assert len(read) == count


def test_what_was_just_written_is_not_taken_for_whole_the_next_time(folder):
    """Within one tick of the clock a second write leaves the time of the first."""
    os.utime(folder / SHARD)
    FeatureStore.open(folder)
    flip_a_bit(folder / SHARD)
    with pytest.raises(UserError, match="1 of 4 shards are damaged"):
        FeatureStore.open(folder)


def test_decay_that_leaves_no_trace_is_found_by_verify_and_then_by_all(made, folder):
    grow_old(folder)
    FeatureStore.open(folder)
    before = (folder / SHARD).stat()
    flip_a_bit(folder / SHARD)
    os.utime(folder / SHARD, ns=(before.st_atime_ns, before.st_mtime_ns))
    store = FeatureStore.open(folder)  # the limit that docs/limits.md tells of
    for use in (store.verify, lambda: FeatureStore.open(folder, anew=True), lambda: FeatureStore.open(folder)):
        with pytest.raises(UserError, match="1 of 4 shards are damaged"):
            use()
    make_store(folder)
    assert contents(folder) == contents(made)


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"shard-00001.safetensors": 3}', b"\xff", b"[" * 5000])
def test_a_damaged_note_of_what_is_whole_is_made_anew(folder, note):
    grow_old(folder)
    (folder / CHECKED).write_bytes(note)
    FeatureStore.open(folder)
    assert len(json.loads((folder / CHECKED).read_bytes())) == 4
    flip_a_bit(folder / SHARD)
    with pytest.raises(UserError, match="1 of 4 shards are damaged"):
        FeatureStore.open(folder)


def test_a_note_that_cannot_be_written_stops_nobody(folder):
    grow_old(folder)
    (folder / CHECKED).unlink(missing_ok=True)
    (folder / CHECKED).mkdir()
    assert len(FeatureStore.open(folder)) > 0


# --- manifests ------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = False) -> None:
    """The manifest after a change; without its checksum, so that what is wrong in it has to be seen."""
    content = json.loads((folder / MANIFEST).read_text())
    if not seal:
        del content["checksum"]
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Sets a value by its dotted path."""

    def change(content):
        *parents, last = (int(word) if word.isdecimal() else word for word in path.split("."))
        for parent in parents:
            content = content[parent]
        content[last] = value

    return change


WRONG = [
    ("support", [], "support is empty"),
    ("support", [0], "support has 1 ids, which are not the"),
    ("support", [2, 2, 11, 40], "support id 2 stands more than once"),
    ("support", [40, 11, 8, 2], "support has 4 ids, which are not the"),
    ("support", [2, 8, 11, VOCABULARY], f"support id {VOCABULARY} is outside the vocabulary of {VOCABULARY} tokens"),
    ("support", [-1, 8, 11, 40], "support id -1 is negative"),
    ("support", None, f"support has {VOCABULARY} ids, which are not the"),
    ("support", ["2", 8, 11, 40], "support.0: input should be a valid integer"),
    ("recipe.support", "auto:3", "support has 4 ids, which are not the 'auto:3'"),
    ("shards.1.file", "../shard-00001.safetensors", "shards.1.file: string should match pattern"),
    ("shards.1.file", "/etc/passwd", "shards.1.file: string should match pattern"),
    ("shards.1.file", "shard-٠٠٠٠١.safetensors", "shards.1.file: string should match pattern"),
    ("shards.1.file", "shard-00000.safetensors", "its shards are not 4 different ones in their order"),
    ("shards.1.file", "shard-00009.safetensors", "its shards are not 4 different ones in their order"),
    ("shards.1.file", "shard-0000001.safetensors", "its shards are not 4 different ones in their order"),
    ("shards.1.tokens", -1, "shards.1.tokens: input should be greater than or equal to 0"),
    ("shards.1.tokens", 10**6, f"{SHARD} cannot hold 1000000 tokens in"),
    ("shards.1.tokens", 10**30, "shards.1.tokens: input should be less than"),
    ("shards.1.tokens", True, "shards.1.tokens: input should be a valid integer"),
    ("shards.1.dropped", 3, f"{SHARD} cannot have dropped 3 tokens without a threshold"),
    ("shards.1.sha256", "abc", "shards.1.sha256: string should match pattern"),
    ("shards", [], "lists 0 of the 4 shards of its store"),
    ("num_shards", 5, "lists 4 of the 5 shards of its store"),
    ("num_shards", 0, "num_shards: input should be greater than or equal to 1"),
    ("num_shards", 10**12, "num_shards: input should be less than or equal to"),
    ("threshold", math.nan, "threshold: input should be a finite number"),
    ("threshold", -math.inf, "threshold: input should be a finite number"),
    ("threshold", 0.5, "threshold 0.5 does not go with keep_top None"),
    ("recipe.keep_top", 0.5, "threshold None does not go with keep_top 0.5"),
    ("recipe.keep_top", 1.5, "recipe.keep_top: input should be less than or equal to 1"),
    ("recipe.part", [2, 1], "recipe: part 2 of 1 cannot be"),
    ("recipe.part", [0, 1], "recipe.part.0: input should be greater than or equal to 1"),
    ("recipe.hidden_dtype", "int8", "recipe.hidden_dtype: input should be"),
    ("recipe.temperature", 0.0, "recipe.temperature: input should be greater than 0"),
    ("recipe.model.vocab_size", 2**40, "recipe.model.vocab_size: input should be less than or equal to"),
    ("recipe.model.hidden_size", 0, "recipe.model.hidden_size: input should be greater than or equal to 1"),
    ("recipe.model.hidden_size", "16", "recipe.model.hidden_size: input should be a valid integer"),
    ("format", "moe-bias features 9", "format: input should be"),
    ("recipe.more", 1, "recipe.more: extra inputs are not permitted"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG)
def test_a_manifest_that_cannot_be_right_is_refused_by_its_field(folder, path, value, sentence):
    edited(folder, put(path, value))
    with pytest.raises(UserError) as refusal:
        FeatureStore.open(folder)
    assert sentence in str(refusal.value)
    assert "; restore it from a copy, or remove the folder and extract again" in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [("recipe.model.head_scale", 0.5), ("recipe.source", "x"), ("versions", {}), ("recipe.examples", 1)],
)
def test_any_other_change_of_a_manifest_is_seen(folder, path, value):
    edited(folder, put(path, value), seal=True)
    with pytest.raises(UserError, match="was changed after it was written: its checksum does not fit; restore it"):
        FeatureStore.open(folder)


def test_a_manifest_of_before_there_were_checksums_is_read(folder):
    edited(folder, lambda content: None)
    assert FeatureStore.open(folder).support.tolist() == SUPPORT


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe", "can't decode byte 0xff in position 0"),
        (b'{"format": 1, "format": 2}', "is not JSON: key 'format' stands twice"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "is not JSON: "),
        (b"[]", "is not a manifest that can be read: input should be"),
        (b"null", "is not a manifest that can be read: input should be"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_manifest(folder, content, sentence):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        FeatureStore.open(folder)
    assert sentence in str(refusal.value)


def test_a_pipe_in_the_manifests_place_is_not_waited_for(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(UserError, match=r"holds no feature store: it has no manifest\.json"):
        FeatureStore.open(folder)


def paths_of(tree: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [found for key, value in items for found in paths_of(value, (*path, key))]


@pytest.mark.parametrize("seal", [True, False])
def test_five_hundred_odd_manifests(made, folder, seal):
    """Each is refused in a sentence, or says the same as before in all that training reads."""
    odd = [None, True, -1, 0, 1, 2**64, 1e400, 0.5, "", "x", "\ud800", [], [0], {}, {"a": 1}, [[]], 10**400]
    draw = random.Random(0)
    before = json.loads((made / MANIFEST).read_text())
    sentences = []
    for _ in range(250):
        content = json.loads(json.dumps(before))
        if not seal:
            del content["checksum"]
        path = draw.choice(paths_of(content))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        value = draw.choice(odd)
        same = parent[path[-1]] == value and type(parent[path[-1]]) is type(value)
        parent[path[-1]] = value
        (folder / MANIFEST).write_text(json.dumps(content))
        try:
            store = FeatureStore.open(folder)
            shape = store.at(slice(None)).hidden.shape
        except UserError as error:
            sentences.append(str(error))
        else:
            left_out = path == ("checksum",) and value is None
            assert not seal or same or left_out, (path, value)
            assert store.manifest.support_ids() == SUPPORT
            assert shape == (len(store), HIDDEN)
    assert len(sentences) > 150
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"seconds": "1"}', b'{"seconds": NaN}', b"\xff"])
def test_garbled_seconds_are_told(folder, content):
    (folder / SECONDS).write_bytes(content)
    for use in (lambda: FeatureStore.open(folder).seconds, lambda: make_store(folder)):
        with pytest.raises(UserError, match=r"seconds\.json' "):
            use()


@pytest.mark.parametrize("seconds", ["-1", "true", "1e999", "[]"])
def test_seconds_that_are_none_are_told(folder, seconds):
    (folder / SECONDS).write_text(f'{{"seconds": {seconds}}}')
    with pytest.raises(UserError, match=r"does not tell how many seconds .*; remove it, nothing else needs it"):
        FeatureStore.open(folder).seconds  # noqa: B018


# --- shards that fit their checksum and still are wrong ---------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A shard with other tensors, which its manifest lists as it is now."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    content = save(tensors)
    (folder / SHARD).write_bytes(content)

    def list_it(manifest):
        manifest["shards"][1] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edited(folder, list_it)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update(hidden=t["hidden"].double()), "has column 'hidden' as float64"),
        (
            lambda t: t.update(hidden=torch.cat(2 * [t["hidden"]], -1)),
            "has column 'hidden' as float32 .*, its manifest",
        ),
        (lambda t: t.update(token=t["token"].double()), "has column 'token' as float64"),
        (lambda t: t.update(entropy=torch.cat(2 * [t["entropy"]])), "has column 'entropy' as float32"),
        (lambda t: t.update(more=t["hidden"] + 1), "has column 'more' as float32 .*says none"),
        (lambda t: t["token"].fill_(VOCABULARY), f"has token {VOCABULARY}, outside 0 to {VOCABULARY - 1}"),
        (lambda t: t["token"].fill_(-1), "has token -1, outside 0"),
        (lambda t: t["example"].fill_(-4), "has example -4, outside 0"),
        (lambda t: t["entropy"].fill_(torch.nan), "has NaN or infinite values in its column 'entropy'"),
    ],
)
def test_columns_are_what_the_recipe_says(folder, change, sentence):
    rewritten(folder, change)
    store = FeatureStore.open(folder)
    for use in (lambda: store.at(slice(None)), lambda: store.token, lambda: list(store.parts())):
        with pytest.raises(UserError, match=f"shard '.*{SHARD}' {sentence}"):
            use()


def test_a_shard_that_is_no_safetensors_file(folder):
    content = b"\xff" * (folder / SHARD).stat().st_size
    (folder / SHARD).write_bytes(content)
    edited(folder, put("shards.1.sha256", hashlib.sha256(content).hexdigest()))
    with pytest.raises(UserError, match=rf"shard '.*{SHARD}' cannot be read \("):
        FeatureStore.open(folder).at(slice(None))


def test_extraction_does_not_go_on_in_a_store_that_was_changed(folder):
    edited(folder, put("recipe.model.head_scale", 0.5), seal=True)
    model = tiny_model()
    with pytest.raises(UserError, match="was changed after it was written"):
        extract(model, find_head(model)[1], plan_of(), folder)
