"""What both models made of a prompt: where answers part, and its record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.inspections import token
from moe_bias.analysis.inspection import read_inspection, shared_length
from moe_bias.mistakes import UserError


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_shared_length_is_that_of_the_longest_common_beginning(one, other):
    length = shared_length([[token(number, "x") for number in answer] for answer in (one, other)])
    assert one[:length] == other[:length]
    assert one[length : length + 1] != other[length : length + 1] or length == len(one) == len(other)


def test_a_damaged_record_is_refused(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text('{"inspection": {"answers": [{"name": "base"}]}}')
    with pytest.raises(UserError, match=r"tokens\.json' is damaged"):
        read_inspection(path)
