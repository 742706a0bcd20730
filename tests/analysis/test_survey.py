"""One layer over one text: streamed from a store, from memory, on another support, and what is kept of it."""

from dataclasses import fields

import pytest
import torch

from helpers.calls import counted
from helpers.models import VOCABULARY, randomise, tiny_model
from helpers.stores import SUPPORT, assert_same_features, corpus_of, make_store
from moe_bias.analysis import survey as survey_module
from moe_bias.analysis.moments import CONTEXT_TOKENS, Strongest, moment_at
from moe_bias.analysis.readings import read_tokens
from moe_bias.analysis.summary import overlap_share
from moe_bias.analysis.survey import Survey, Text, mark, overlap, survey
from moe_bias.backbone import find_head
from moe_bias.chunks import AtOnce
from moe_bias.config import LayerConfig
from moe_bias.features.store import FeatureStore
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.support import fork_threshold

KINDS = torch.arange(VOCABULARY) % 6


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "store", corpus_of(40))
    return FeatureStore.open(tmp_path / "store")


def head():
    return find_head(tiny_model())[1]


def layer_on(support):
    layer = MoEBiasLayer(LayerConfig(experts="free", num_experts=3, top_k=2, support=support), 16, VOCABULARY)
    randomise(layer, scale=0.5)
    return layer


def surveyed(text, support=tuple(SUPPORT), flips=4, contexts=2) -> Survey:
    return survey(layer_on(support), head(), text, mark(text, KINDS), flips, contexts, "test")


def assert_same_survey(found: Survey, expected: Survey) -> None:
    for field in fields(found.tally):
        ours, theirs = getattr(found.tally, field.name), getattr(expected.tally, field.name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.adapted_entropy, expected.adapted_entropy, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((found.flips, *found.contexts), (expected.flips, *expected.contexts), strict=True):
        assert [moment.number for moment in ours.moments] == [moment.number for moment in theirs.moments]
        assert [moment.context for moment in ours.moments] == [moment.context for moment in theirs.moments]


def test_parts_of_a_store_are_its_tokens(store):
    parts = list(store.parts())
    assert len(parts) == len(store.manifest.shards) > 3
    start = 0
    for part in parts:
        assert_same_features(part, store.at(slice(start, start + len(part))), atol=0)
        start += len(part)
    assert start == len(store)


def test_streaming_joins_no_column_in_memory(store, monkeypatch):
    joined = counted(monkeypatch, FeatureStore, "small_column")
    surveyed(Text(store))
    assert joined == []
    assert len(store.entropy) == len(store)
    assert joined == [store]


def test_a_streamed_text_gives_what_the_whole_gives(store, monkeypatch):
    whole = surveyed(Text(store.at(slice(None))))
    assert_same_survey(surveyed(Text(store)), whole)
    monkeypatch.setattr(survey_module, "READINGS", AtOnce(3 * len(SUPPORT), 3 * len(SUPPORT)))
    assert_same_survey(surveyed(Text(store)), whole)


def test_another_support_is_read_over_the_whole_vocabulary(store, tmp_path):
    """A store made on that support gives the same."""
    other = (3, 11, 12, 50, 90)
    make_store(tmp_path / "other", corpus_of(40), support=list(other))
    direct = surveyed(Text(FeatureStore.open(tmp_path / "other")), other)
    assert_same_survey(surveyed(Text(store), other), direct)
    assert float(direct.tally.sums[..., 2].sum()) > 0


def test_only_the_named_rows_are_read(store):
    rows = store.example.unique()[::3]
    mine = torch.isin(store.example, rows)
    found = surveyed(Text(store, rows))
    assert int(found.tally.tokens.sum()) == int(mine.sum())
    assert_same_survey(found, surveyed(Text(store.at(mine))))


def test_strata_and_overlap_are_those_of_their_definition(store):
    text = Text(store)
    marks, found = mark(text, KINDS), surveyed(text)
    assert torch.equal(marks.entropy, store.entropy)
    assert marks.examples == len(store.example.unique())
    high_T = store.entropy >= fork_threshold(store.entropy)
    assert int(found.tally.tokens[:, 0].sum()) == int(high_T.sum())
    adapted_T = read_tokens(layer_on(tuple(SUPPORT)), head(), store.at(slice(None)).hidden, store.token).adapted_entropy
    torch.testing.assert_close(found.adapted_entropy, adapted_T, rtol=1e-4, atol=1e-5)
    both_T = high_T & (found.adapted_entropy >= fork_threshold(found.adapted_entropy))
    shared = overlap(text, marks, found.adapted_entropy)
    assert overlap_share(shared).value == pytest.approx(float(both_T.sum() / high_T.sum()))
    assert overlap_share(overlap(text, marks, store.entropy)).value == 1


def test_moments_are_tokens_in_their_context(store):
    found, whole = surveyed(Text(store), flips=1000), store.at(slice(None))
    readings = read_tokens(layer_on(tuple(SUPPORT)), head(), whole.hidden, whole.token)
    assert {moment.number for moment in found.flips.moments} == set(readings.flipped.nonzero().flatten().tolist())
    scores = [moment.score for moment in found.flips.moments]
    assert scores == sorted(scores, reverse=True)
    for moment in found.flips.moments:
        place = moment.number
        assert (moment.token, moment.example) == (int(store.token[place]), int(store.example[place]))
        start = place - moment.position
        assert moment.context == tuple(store.token[max(start, place - CONTEXT_TOKENS) : place].tolist())
        assert moment.score == moment.kl == pytest.approx(float(readings.kl[place]), rel=1e-3)
    for expert, strongest in enumerate(found.contexts):
        assert len(strongest.moments) == 2
        assert all(expert in moment.experts for moment in strongest.moments)


def test_the_strongest_are_the_first_of_equals(store):
    whole = store.at(slice(None))
    readings = read_tokens(layer_on(tuple(SUPPORT)), head(), whole.hidden, whole.token)
    kept = Strongest(3)
    for score_T in (torch.tensor([1.0, 5.0, 1.0]), torch.tensor([1.0, 5.0, -torch.inf])):
        first = 10 * len(kept.moments)
        kept = kept.with_more(
            [moment_at(whole, row, readings, row, float(score_T[row]), first + row) for row in kept.candidates(score_T)]
        )
    assert [(moment.score, moment.number) for moment in kept.moments] == [(5.0, 1), (5.0, 31), (1.0, 0)]
    assert kept.candidates(torch.tensor([1.0, 0.5])) == []
    assert Strongest(0).candidates(torch.tensor([1.0])) == []


def test_a_text_without_tokens_is_refused(store):
    with pytest.raises(UserError, match="no tokens"):
        mark(Text(store, torch.tensor([10**6])), KINDS)
