"""Tokens of rows and texts that go through the model together are what each gives alone."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.chatting import ask, running_engine, served_folder
from helpers.models import ARCHITECTURES, tiny_model
from moe_bias.backbone import hidden_states
from moe_bias.server import engine as engines
from moe_bias.server.answer import Given
from moe_bias.server.batch import Batch
from moe_bias.server.prefixes import extended
from moe_bias.server.together import Text, can_pass_together

CLOSE = {"rtol": 1e-6, "atol": 1e-8}
TOKENS = st.lists(st.integers(3, 60), min_size=1, max_size=9)
MODELS = {name: tiny_model(name).double() for name in ARCHITECTURES}
ABLE = [name for name in ARCHITECTURES if name != "gemma2"]


def whole(model, tokens):
    ids = torch.tensor([tokens])
    return hidden_states(model, ids, torch.ones_like(ids))[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_whose_layers_see_only_the_last_tokens_is_not_passed_together(name):
    assert can_pass_together(MODELS[name]) == (name in ABLE)


def test_a_model_that_takes_no_such_mask_is_not_passed_together(monkeypatch):
    model = tiny_model("llama")

    def forward(*args, **choices):
        assert choices["attention_mask"].dim() == 2

    monkeypatch.setattr(model, "forward", forward)
    assert not can_pass_together(model)


@pytest.mark.parametrize("name", ABLE)
@settings(deadline=None, max_examples=15)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=4),
    texts=st.lists(st.tuples(st.integers(0, 9), TOKENS), max_size=3),
    coming=st.lists(st.integers(3, 60), min_size=8, max_size=8),
)
def test_rows_and_texts_are_what_each_is_alone(name, rows, texts, coming):
    model, batch, rows = MODELS[name], Batch(MODELS[name]), [list(row) for row in rows]
    for row in rows:
        batch.join(extended(model, None, row))

    def appended(start):
        tokens = coming[start : start + len(rows)]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        return tokens

    asked = []
    for known, tokens in texts:
        known = min(known, len(tokens) - 1)
        asked.append(Text(extended(model, None, tokens[:known]) if known else None, tuple(tokens)))
    hidden_BD, read = batch.next_beside(appended(0), asked)
    for row, hidden_D in zip(rows, hidden_BD, strict=True):
        torch.testing.assert_close(hidden_D, whole(model, row)[-1], **CLOSE)
    for text, prefix in zip(asked, read, strict=True):
        assert prefix.tokens == text.tokens
        torch.testing.assert_close(prefix.hidden, whole(model, list(text.tokens)), **CLOSE)
        longer = [*text.tokens, 40, 41]
        torch.testing.assert_close(extended(model, prefix, longer).hidden, whole(model, longer), **CLOSE)
    for row, hidden_D in zip(rows, batch.next(appended(4)), strict=True):
        torch.testing.assert_close(hidden_D, whole(model, row)[-1], **CLOSE)
    layers, row = batch.leave(0), rows[0]
    alone = extended(model, None, row)
    for found, expected in zip(layers, alone.layers, strict=True):
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
        torch.testing.assert_close(found[1], expected[1], **CLOSE)


@pytest.mark.parametrize("most", [0, 64])
def test_features_asked_for_while_answers_are_written_are_those_of_a_quiet_server(tmp_path, monkeypatch, most):
    base, adapters = served_folder(tmp_path)
    prompt, edited, beside = [5, 6, 7, 8], [9, 10, 11, 2], []
    monkeypatch.setattr(engines, "MOST_TOKENS", most)
    plain = Batch.next_beside
    monkeypatch.setattr(Batch, "next_beside", lambda *given: (beside.append(given), plain(*given))[1])
    with running_engine(base, adapters) as engine:
        (expected,) = engine.features_of(prompt, [Given(edited)], "one")
    with running_engine(base, adapters) as engine:
        heard = [ask(engine, [3 + seed, 4], ("one",), seed=seed, limit=300) for seed in range(3)]
        for each in heard:
            each.next()
        (found,) = engine.features_of(prompt, [Given(edited)], "one")
        for each in heard:
            each.answering.call_off()
    assert bool(beside) == bool(most)
    torch.testing.assert_close(found.hidden, expected.hidden)
    torch.testing.assert_close(found.rest.log_sum_exp, expected.rest.log_sum_exp)


def test_a_text_that_waits_when_the_server_stops_is_told(tmp_path, monkeypatch):
    base, adapters = served_folder(tmp_path)
    engine = engines.Engine(base, adapters)
    monkeypatch.setattr(engine, "_read_alone", lambda: None)
    monkeypatch.setattr(engine, "_passes_together", False)
    found = []

    def ask_for_features():
        with pytest.raises(engines.EngineClosedError, match="stopped"):
            engine.features_of([5, 6], [Given([7])], "one")
        found.append(True)

    thread = threading.Thread(target=ask_for_features)
    thread.start()
    while not engine._readings:
        thread.join(0.01)
    engine.close()
    thread.join()
    assert found
