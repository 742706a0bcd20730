"""Views of a feature source, and what training takes from a store."""

import pytest
import torch

from conftest import tiny_model
from moe_bias.backbone import find_head
from moe_bias.features.source import Subset
from moe_bias.features.store import FeatureStore
from moe_bias.training.run_folder import digest, identity
from moe_bias.training.sft import prepare_stored
from stores import SUPPORT, corpus_of, make_store
from test_store import assert_same_features


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "store")
    return FeatureStore.open(tmp_path / "store")


def test_a_view_reads_the_tokens_that_it_names(store):
    index = torch.tensor([7, 2, 30, 2])
    view, expected = Subset(store, index), store.at(index)
    assert len(view) == 4
    assert torch.equal(view.support, store.support)
    assert torch.equal(view.token, expected.token)
    assert_same_features(view.at(slice(1, 9)), expected.at(slice(1, 9)), atol=0)
    assert_same_features(view.at(torch.tensor([3, 0])), expected.at(torch.tensor([3, 0])), atol=0)
    with pytest.raises(IndexError):
        view.at(torch.tensor([4]))


def different(store, index, **changes):
    """The names under which features differ from those of the tokens 5 to 25 and 0 to 5 of a store."""
    whole, held_out = digests(Subset(store, torch.arange(5, 25)), store.at(torch.arange(5))), store.at(torch.arange(5))
    other = digests(Subset(changes.get("store", store), index), changes.get("held_out", held_out))
    return {name for name in whole if whole[name] != other[name]}


def test_a_run_is_known_by_its_tokens_and_their_hidden_states(store, tmp_path):
    index = torch.arange(5, 25)
    assert different(store, index) == set()
    assert different(store, index + 1) == {"training tokens", "hidden states"}
    make_store(tmp_path / "again")
    assert different(store, index, store=FeatureStore.open(tmp_path / "again")) == set()
    make_store(tmp_path / "half", hidden_dtype=torch.bfloat16)
    half = FeatureStore.open(tmp_path / "half")
    assert different(store, index, store=half) == {"hidden states"}
    assert different(store, index, held_out=half.at(torch.arange(5))) == {"hidden states"}
    assert different(store, index, held_out=store.at(torch.arange(1, 6))) == {"held-out tokens", "hidden states"}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("ids", [[5, 3, 90], list(range(VOCABULARY)), 30])
def test_another_support_from_stored_hidden_states_is_that_of_the_direct_way(tmp_path, name, ids):
    """To the last bit in float64: the same hidden states go through the same sums."""
    make_store(tmp_path / "store", name=name)
    store, head = FeatureStore.open(tmp_path / "store"), find_head(tiny_model(name))[1]
    index = torch.arange(4, len(store))
    held = store.at(index)
    text = "all" if ids == list(range(VOCABULARY)) else f"auto:{ids}"
    if text == "auto:[5, 3, 90]":
        text = str(tmp_path / "ids.json")
        (tmp_path / "ids.json").write_text(json.dumps(ids))
    view = prepare_stored(store, head, store.example[:4].unique().tolist(), text, always=[96]).train
    if isinstance(ids, int):
        ids = view.support.tolist()
        assert len(ids) == 30
        assert 96 in ids
    rows = torch.isin(store.example, store.example[:4].unique(), invert=True)
    held = store.at(rows)
    direct = with_scalars(head, HiddenTokens(held.hidden, held.token, held.example), ids, "test")
    found = view.at(slice(None))
    assert torch.equal(found.rest.log_sum_exp, direct.rest.log_sum_exp)
    assert torch.equal(found.rest.mean_logit, direct.rest.mean_logit)
    assert torch.equal(found.column, direct.column)
    assert torch.equal(found.support, direct.support)
    assert torch.equal(found.hidden, direct.hidden)


def test_held_out_examples_are_apart_and_numbered_without_gaps(store):
    rows = store.example.unique().tolist()
    held_out = [rows[1], rows[4], rows[5]]
    prepared = prepare_stored(store, find_head(tiny_model())[1], held_out)
    is_held_out = torch.isin(store.example, torch.tensor(held_out))
    assert_same_features(prepared.held_out, store.at(is_held_out), atol=0)
    assert_same_features(prepared.train.at(slice(None)), store.at(~is_held_out), atol=0)
    numbers = {row: number for number, row in enumerate(held_out)}
    assert prepared.held_out.example.tolist() == [numbers[row] for row in store.example[is_held_out].tolist()]
    assert prepared.support == tuple(SUPPORT)
    assert 0 < prepared.fork_coverage < 1


def test_parts_are_prepared_as_the_whole(tmp_path):
    corpus = corpus_of(20)
    make_store(tmp_path / "whole", corpus, support=list(range(97)), batch_size=1)
    folders = [tmp_path / f"part-{number}" for number in (2, 1)]
    for folder in folders:
        make_store(folder, corpus, part=(int(folder.name[-1]), 2), support=list(range(97)), batch_size=1)
    head, held_out = find_head(tiny_model())[1], corpus.rows[3:6]
    whole = prepare_stored(FeatureStore.open(tmp_path / "whole"), head, held_out)
    joined = prepare_stored(FeatureStore.open(*folders), head, held_out)
    assert whole.support is joined.support is None
    assert_same_features(joined.held_out, whole.held_out)
    assert_same_features(joined.train.at(slice(None)), whole.train.at(slice(None)))
