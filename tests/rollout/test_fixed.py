"""Rows in fixed places against rows that move: the same answers, whatever ends when."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import ARCHITECTURES, VOCABULARY, tiny_model
from moe_bias.backbone import find_head
from moe_bias.progress import meter
from moe_bias.rollout import decoding, fixed
from moe_bias.rollout.decoding import answer_batch

FIXED = [name for name in ARCHITECTURES if fixed.attends_to_all(tiny_model(name).config)]


def answers(model, prompts, copies, stops, limit, in_places):
    """Greedy but for each row's own shift, so that copies differ."""
    head = find_head(model)[1]

    def choose(hidden_BD, number_B, step):
        shift_B = (number_B % copies)[:, None] == (torch.arange(VOCABULARY) % copies)
        return (head.logits(hidden_BD) + 2.0 * shift_B).argmax(-1)

    with pytest.MonkeyPatch.context() as patch, meter("", 1, "answers", visible=False) as bar:
        patch.setattr(decoding, "goes_into_a_graph", lambda *_: in_places)
        patch.setattr(fixed, "SMALLEST", 1)
        return answer_batch(model, prompts, copies, choose, stop_ids=stops, limit=limit, bar=bar)


@pytest.mark.parametrize("name", FIXED)
def test_answers_are_those_of_rows_that_move(name):
    model = tiny_model(name).double()
    prompts = [[5, 6, 7, 8], [9], [11, 12, 13, 14, 15, 16, 17]]
    endless = answers(model, prompts, 3, [], 23, in_places=False)
    stops = {answer.token_ids[2 * row] for row, answer in enumerate(endless[1:])}
    found, expected = (answers(model, prompts, 3, sorted(stops), 23, in_places) for in_places in (True, False))
    assert found == expected
    assert len({len(answer.token_ids) for answer in expected}) > 1


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=30),
    st.integers(1, 9),
)
def test_whatever_is_asked_and_whatever_ends_it(prompts, copies, stops, limit):
    model = tiny_model("qwen2").double()
    found, expected = (answers(model, prompts, copies, sorted(stops), limit, in_places) for in_places in (True, False))
    assert found == expected


@pytest.mark.parametrize("name", set(ARCHITECTURES) - set(FIXED))
def test_windows_are_left_to_rows_that_move(name):
    assert tiny_model(name).config.sliding_window


def test_a_cpu_has_no_graphs():
    assert not fixed.goes_into_a_graph(tiny_model(), 100, 0)
