import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import HIDDEN, VOCABULARY, tiny_model
from helpers.stores import FACTS, SUPPORT, assert_same_features, contents, corpus_of, make_store
from moe_bias.backbone import find_head
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.features.store import SMALL_COLUMNS, FeatureStore
from moe_bias.mistakes import UserError
from moe_bias.support import fork_threshold


@pytest.fixture
def folder(tmp_path):
    make_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_store_holds_the_features_of_the_corpus_in_its_order(tmp_path, name, batch_size):
    corpus = corpus_of()
    make_store(tmp_path / "store", corpus, name, batch_size=batch_size)
    store = FeatureStore.open(tmp_path / "store")
    model = tiny_model(name)
    expected = with_scalars(find_head(model)[1], run_backbone(model, corpus.examples, 3, "test"), SUPPORT, "test")
    assert len(store) == len(expected)
    assert len(store.manifest.shards) > 2
    assert_same_features(store.at(slice(None)), expected)
    rows = torch.tensor(corpus.rows)[expected.example]
    assert torch.equal(store.at(slice(None)).example, rows)
    assert torch.equal(store.example, rows)
    assert torch.equal(store.token, expected.token)
    torch.testing.assert_close(store.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert store.support.tolist() == SUPPORT


def test_any_rows_in_any_order(folder):
    store = FeatureStore.open(folder)
    whole = store.at(slice(None))
    index = torch.randint(len(store), (70,), generator=torch.Generator().manual_seed(0))
    assert_same_features(store.at(index), whole.at(index), atol=0)
    assert_same_features(store.at(slice(3, 30)), whole.at(slice(3, 30)), atol=0)
    assert_same_features(store.at(whole.entropy > 1), whole.at(whole.entropy > 1), atol=0)
    assert len(store.at(slice(5, 5))) == len(store.at(torch.empty(0, dtype=torch.int64))) == 0
    assert store.at(slice(5, 5)).hidden.shape == (0, HIDDEN)
    for outside in (torch.tensor([len(store)]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            store.at(outside)
    with pytest.raises(IndexError, match="a slice of step 2"):
        store.at(slice(0, 9, 2))


def mapped_ranges(path: Path) -> list[range]:
    """Addresses at which this process has the file in memory."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(end, 16) for end in words[0].split("-"))) for words in maps]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not list its memory maps")
def test_hidden_states_of_a_slice_are_the_pages_of_the_file(folder):
    store = FeatureStore.open(folder)
    hidden = store.at(slice(1, 4)).hidden
    assert any(hidden.data_ptr() in mapped for mapped in mapped_ranges(folder / "shard-00000.safetensors"))
    assert hidden.data_ptr() == store.at(slice(1, 2)).hidden.data_ptr()


def test_scalars_belong_to_the_hidden_states_as_they_are_stored(tmp_path):
    make_store(tmp_path / "half", hidden_dtype=torch.bfloat16)
    features = FeatureStore.open(tmp_path / "half").at(slice(None))
    assert features.hidden.dtype == torch.bfloat16
    logits_TV = find_head(tiny_model())[1].logits(features.hidden.float()).double()
    torch.testing.assert_close(features.log_partition, logits_TV.logsumexp(-1), rtol=1e-6, atol=1e-6)
    realised_T = logits_TV.gather(-1, features.token[:, None]).squeeze(-1)
    torch.testing.assert_close(features.logit.double(), realised_T, rtol=1e-6, atol=1e-6)


def test_files_say_what_they_hold(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["recipe"]["model"] == json.loads(FACTS.model_dump_json())
    assert manifest["recipe"]["temperature"] == 1.0
    assert manifest["support"] == SUPPORT
    shard = load_file(folder / "shard-00000.safetensors")
    assert set(shard) == {"hidden", *SMALL_COLUMNS}
    assert shard["rest_log_sum_exp"].dtype == shard["rest_mean_logit"].dtype == torch.float64


def test_keep_top_keeps_what_reaches_the_threshold_and_says_what_it_dropped(tmp_path):
    corpus = corpus_of(40)
    make_store(tmp_path / "all", corpus)
    manifest = make_store(tmp_path / "top", corpus, keep_top=0.3)
    everything, kept = FeatureStore.open(tmp_path / "all"), FeatureStore.open(tmp_path / "top")
    # The sample is the whole corpus here, so the threshold is the corpus's own, to four digits.
    assert manifest.threshold == pytest.approx(fork_threshold(everything.entropy, 0.3), rel=5e-4)
    expected = everything.at(everything.entropy.double() >= manifest.threshold)
    assert_same_features(kept.at(slice(None)), expected, atol=0)
    assert torch.equal(kept.example, expected.example)
    assert (manifest.tokens, manifest.dropped) == (len(kept), len(everything) - len(kept))
    assert kept.dropped == manifest.dropped


def test_a_shard_may_keep_nothing(tmp_path):
    manifest = make_store(tmp_path / "store", keep_top=0.02)
    assert 0 in [shard.tokens for shard in manifest.shards]
    store = FeatureStore.open(tmp_path / "store")
    assert len(store.at(slice(None))) == len(store.at(torch.arange(len(store)))) == len(store) == 1
    store.verify()


@pytest.mark.parametrize("support", [SUPPORT, 20, list(range(VOCABULARY))])
def test_parts_join_to_the_whole(tmp_path, support):
    corpus = corpus_of(20)
    choices = {"support": support, "keep_top": 0.5, "batch_size": 1}
    make_store(tmp_path / "whole", corpus, **choices)
    folders = [tmp_path / f"part-{number}" for number in (3, 1, 2)]
    for folder in folders:
        make_store(folder, corpus, part=(int(folder.name[-1]), 3), **choices)
    whole, joined = FeatureStore.open(tmp_path / "whole"), FeatureStore.open(*folders)
    assert len(joined) == len(whole)
    back = torch.argsort(joined.example, stable=True)
    assert torch.equal(joined.example[back], whole.example)
    assert_same_features(joined.at(back), whole.at(slice(None)))
    assert joined.dropped == whole.dropped


def test_parts_are_counted_once_and_belong_together(tmp_path):
    corpus = corpus_of()
    first, second = tmp_path / "first", tmp_path / "second"
    make_store(first, corpus, part=(1, 2))
    for part, choices, sentence in [
        ((1, 2), {}, "are the same part, 1 of 2; list each part once"),
        ((2, 3), {}, "overlap: they are parts of 2 and of 3"),
        ((2, 2), {"corpus": corpus_of(seed=1)}, "are no parts of one store: corpus is "),
        ((2, 2), {"support": [5]}, "are no parts of one store: support is "),
        ((2, 2), {"hidden_dtype": torch.bfloat16}, "hidden_dtype is 'float32' and 'bfloat16'"),
        ((2, 2), {"keep_top": 0.5}, "keep_top is None and 0.5"),
        ((2, 2), {"name": "gemma2", "facts": FACTS.model_copy(update={"head": "g"})}, "model.head is 'h' and 'g'"),
    ]:
        make_store(second, **{"corpus": corpus, "part": part, **choices})
        with pytest.raises(UserError, match=re.escape(sentence)):
            FeatureStore.open(first, second)
        for path in second.iterdir():
            path.unlink()
    with pytest.raises(UserError, match="are the same part"):
        FeatureStore.open(first, first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "x"),
        ("head", "x"),
        ("head_scale", 0.5),
        ("head_cap", 30.0),
        ("tokenizer", "x"),
        ("hidden_size", 32),
        ("vocab_size", 98),
    ],
)
def test_check_names_the_field_that_does_not_fit(folder, field, value):
    store = FeatureStore.open(folder)
    store.check(FACTS.model_copy(update={"name": "elsewhere", "compute_dtype": "bfloat16"}), support=SUPPORT)
    sentence = f"made with model 'tiny', does not fit: its {field} is {getattr(FACTS, field)!r}, here it is {value!r}"
    with pytest.raises(UserError, match=re.escape(sentence)):
        store.check(FACTS.model_copy(update={field: value}))


def test_check_compares_support_and_temperature_where_given(folder):
    store = FeatureStore.open(folder)
    store.check(FACTS, temperature=1.0)
    with pytest.raises(UserError, match=r"its temperature is 1\.0, here it is 0\.7"):
        store.check(FACTS, temperature=0.7)
    with pytest.raises(UserError, match=r"its support is \[2, 8, 11, 40\], here it is \[2\]"):
        store.check(FACTS, support=[2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))


def test_verify_names_the_damaged_shard(folder):
    store = FeatureStore.open(folder)
    store.verify()
    flip_a_bit(folder / "shard-00002.safetensors")
    with pytest.raises(UserError, match=r"1 of \d+ shards are damaged: '.*shard-00002.safetensors'; make the store"):
        store.verify()


def test_a_damaged_shard_is_made_again_after_it_was_deleted(folder):
    before = contents(folder)
    (folder / "shard-00002.safetensors").unlink()
    make_store(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON: Expecting property name"),
        ('{"format": "moe-bias features 2"}', "is not a manifest that can be read: format: input should be"),
    ],
)
def test_a_damaged_manifest_is_told(folder, content, sentence):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        FeatureStore.open(folder)


def test_folders_without_a_complete_store_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="holds no feature store: it has no manifest"):
        FeatureStore.open(tmp_path)
    (folder / "manifest.json").rename(folder / "unfinished.json")
    with pytest.raises(UserError, match=r"is unfinished, .* shards are whole; make it again as it was begun"):
        FeatureStore.open(folder)
    with pytest.raises(UserError, match="no folder of a feature store is given"):
        FeatureStore.open()
