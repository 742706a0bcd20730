"""Views of a feature source, and what training takes from a store."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.models import VOCABULARY, tiny_model
from helpers.stores import SUPPORT, assert_same_features, corpus_of, make_store
from moe_bias.backbone import find_head
from moe_bias.features.extract import HiddenTokens, with_scalars
from moe_bias.features.source import Subset, on_support
from moe_bias.features.store import FeatureStore
from moe_bias.training.run_folder import digests
from moe_bias.training.sft import prepare_stored


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


def different(one, other):
    """The names under which two runs' features differ."""
    ours, theirs = digests(*one), digests(*other)
    return {name for name in ours if ours[name] != theirs[name]}


def test_a_run_is_known_by_its_tokens_and_their_hidden_states(store, tmp_path):
    def features(source, first=5, held_out=0):
        index = torch.arange(20)
        return Subset(source, first + index), source.at(held_out + index[:5])

    make_store(tmp_path / "again")
    make_store(tmp_path / "half", hidden_dtype=torch.bfloat16)
    again, half = FeatureStore.open(tmp_path / "again"), FeatureStore.open(tmp_path / "half")
    assert different(features(store), features(again)) == set()
    assert different(features(store), features(store, first=6)) == {"training tokens", "hidden states"}
    assert different(features(store), features(store, held_out=1)) == {"held-out tokens", "hidden states"}
    assert different(features(store), features(half)) == {"hidden states"}
    assert different(features(store), (features(store)[0], features(half)[1])) == {"hidden states"}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("support", ["ids.json", "all", "auto:30"])
def test_another_support_from_stored_hidden_states_is_that_of_the_direct_way(tmp_path, monkeypatch, name, support):
    """To the last bit of float64: the same hidden states go through the same sums."""
    monkeypatch.chdir(tmp_path)
    Path("ids.json").write_text("[5, 3, 90]")
    make_store(tmp_path / "store", name=name)
    store, head = FeatureStore.open(tmp_path / "store"), find_head(tiny_model(name))[1]
    held_out = store.example.unique()[:2]
    prepared = prepare_stored(store, head, held_out.tolist(), support, always=[96])
    ids = prepared.train.support.tolist()
    assert ids == {"ids.json": [5, 3, 90], "all": list(range(VOCABULARY)), "auto:30": ids}[support]
    is_held_out = torch.isin(store.example, held_out)
    for found, own in ((prepared.train.at(slice(None)), ~is_held_out), (prepared.held_out, is_held_out)):
        tokens = store.at(own)
        direct = with_scalars(head, HiddenTokens(tokens.hidden, tokens.token, tokens.example), ids, "test")
        assert torch.equal(found.rest.log_sum_exp, direct.rest.log_sum_exp)
        assert torch.equal(found.rest.mean_logit, direct.rest.mean_logit)
        assert torch.equal(found.column, direct.column)
        assert torch.equal(found.support, direct.support)
        assert_same_features(found, direct)
    assert prepared.support == (None if support == "all" else tuple(ids))


def test_rows_of_a_view_on_another_support(store):
    view = on_support(store, find_head(tiny_model())[1], [7, 9], "test")
    assert len(view) == len(store)
    index = torch.tensor([7, 2, 30, 2])
    assert_same_features(view.at(index), view.at(slice(None)).at(index), atol=0)
    assert torch.equal(view.token, store.token)


def test_held_out_examples_have_no_say_in_the_support(tmp_path):
    """Neither in the one that a store is made on, nor in one that is chosen from its hidden states."""
    corpus, other = corpus_of(30), corpus_of(30, seed=1)
    is_out = [number % 4 == 0 for number in range(30)]
    mixed = [(b if out else a) for a, b, out in zip(corpus.examples, other.examples, is_out, strict=True)]
    held_out = [row for row, out in zip(corpus.rows, is_out, strict=True) if out]
    choices = {"support": 40, "always": [96]}
    own = make_store(tmp_path / "own", corpus, held_out=held_out, **choices).support
    assert make_store(tmp_path / "mixed", replace(corpus, examples=mixed), held_out=held_out, **choices).support == own
    assert make_store(tmp_path / "all", corpus, **choices).support != own
    make_store(tmp_path / "store", corpus)
    store, head = FeatureStore.open(tmp_path / "store"), find_head(tiny_model())[1]
    assert list(prepare_stored(store, head, held_out, "auto:40", always=[96]).support) == own


def test_features_cost_their_share_of_what_the_store_took(store):
    (store.folders[0] / "seconds.json").write_text('{"seconds": 1000}')
    head, rows = find_head(tiny_model())[1], store.example.unique().tolist()
    prepared = prepare_stored(store, head, rows[:3])
    share = len(prepared.train) / len(store)
    assert 1000 * share <= prepared.seconds < 1000 * share + 60
    assert share < 0.9


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
