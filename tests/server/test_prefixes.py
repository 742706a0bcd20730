"""What was computed of tokens is what the model computes of them anew, however it was put together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import ARCHITECTURES, tiny_model
from moe_bias.backbone import hidden_states
from moe_bias.server import prefixes
from moe_bias.server.batch import Batch
from moe_bias.server.prefixes import Prefix, Prefixes, extended, shared

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = st.lists(st.integers(3, 8), min_size=1, max_size=12)


def whole(model, tokens):
    ids = torch.tensor([tokens])
    return hidden_states(model, ids, torch.ones_like(ids))[0]


def held(tokens: list[int], width: int = 4) -> Prefix:
    part = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, width)
    return Prefix(tuple(tokens), torch.zeros(len(tokens), 3), ((part, part),))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_go_on_from_a_beginning_as_from_the_start(name, monkeypatch):
    monkeypatch.setattr(prefixes, "PIECE", 3)
    model, tokens = tiny_model(name).double(), [5, 6, 7, 8, 9, 10, 11, 12]
    first = extended(model, None, tokens[:5])
    again = extended(model, first.first(2), tokens)
    for found, length in ((first, 5), (again, 8)):
        torch.testing.assert_close(found.hidden, whole(model, tokens[:length]), **CLOSE)
        assert found.tokens == tuple(tokens[:length])
    torch.testing.assert_close(extended(model, again, tokens).hidden, again.hidden)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_a_batch_are_the_same_whatever_is_beside_them(name):
    model = tiny_model(name).double()
    batch, texts = Batch(model), []

    def join(tokens):
        batch.join(extended(model, None, tokens))
        texts.append(list(tokens))

    def step(tokens):
        found = batch.next(tokens)
        for text, token, hidden_D in zip(texts, tokens, found, strict=True):
            text.append(token)
            torch.testing.assert_close(hidden_D, whole(model, text)[-1], **CLOSE)

    def leave(place):
        layers, text = batch.leave(place), texts.pop(place)
        kept = Prefix(tuple(text), whole(model, text), layers)
        longer = [*text, 40, 41]
        torch.testing.assert_close(extended(model, kept, longer).hidden, whole(model, longer), **CLOSE)

    join([5, 6, 7])
    step([8])
    join([9])
    join([10, 11, 12, 13, 14, 15, 16])
    step([17, 18, 19])
    leave(2)
    step([20, 21])
    leave(0)
    step([22])
    join([23, 24])
    step([25, 26])
    leave(0)
    leave(0)
    assert len(batch) == 0
    join([9, 9])
    step([30])


@settings(max_examples=60)
@given(texts=st.lists(TOKENS, max_size=8), asked=TOKENS, budget=st.integers(0, 40))
def test_the_longest_beginning_is_found_and_the_budget_kept(texts, asked, budget):
    token_bytes = held([1]).nbytes
    store = Prefixes(budget * token_bytes)
    for text in texts:
        store.add(held(text))
        assert store.nbytes <= budget * token_bytes
    found = store.longest(asked)
    everything = max((shared(text, asked) for text in texts), default=0)
    assert len(found or ()) <= everything
    if sum(map(len, texts)) <= budget:
        assert len(found or ()) == everything
    if found is not None:
        assert list(found.tokens) == asked[: len(found)]
        assert found.layers[0][0][0, 0, :, 0].tolist() == asked[: len(found)]


def test_a_conversation_stands_in_place_of_its_beginnings_and_the_least_used_goes():
    store = Prefixes(6 * held([1]).nbytes)
    for text in ([1, 2], [1, 2, 3], [7, 8], [1, 2]):
        store.add(held(text))
    assert store.nbytes == 5 * held([1]).nbytes
    store.longest([1, 2, 3])
    store.add(held([9, 9]))
    assert store.longest([7, 8]) is None
    assert len(store.longest([1, 2, 3, 4])) == 3
    store.add(held([5] * 7))
    assert store.longest([5]) is None
