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


def test_identity_is_that_of_the_same_tokens_in_memory(store):
    index = torch.arange(5, 25)
    assert digest(identity(Subset(store, index))) == digest(identity(store.at(index)))
    assert digest(identity(Subset(store, index))) != digest(identity(store.at(index + 1)))


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
