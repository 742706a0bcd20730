"""Loops and distinct n-grams by hand, and against plain references on drawn texts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bias.evaluation.repetition import LOOP_CHARACTERS, READ_CHARACTERS, REPEATS, distinct, loops, repetition_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("The answer is 42.", False),
        ("0" * 63, False),  # one character too few
        ("0" * 64, True),
        ("So $<<5" + "0" * 64, True),
        ("0" * 64 + ".", False),  # it came out of the loop
        ("0123456789abcde" * 4, False),  # four times, and 60 characters
        ("0123456789abcdef" * 4, True),  # 4 * 16 = 64
        ("0123456789abcdefghijklm" * 3, False),  # 69 characters, and only three times
        ("ab" + "0123456789abcdef" * 4, True),
        ("ef" + "0123456789abcdef" * 4 + "012", True),  # cut within a block: ...def012 is a block too
        ("I add 3.\nI  add 3. I add 3.\n\n" * 4, True),  # white space does not count
        ("Step 1: add. Step 2: add. Step 3: add. Step 4: add. Step 5: add. Step 6: add.", False),  # it counts
        ("我们再算一次。" * 10, True),
    ],
)
def test_loops(text, expected):
    assert loops(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 1.0),
        ("a b c", 1.0),
        ("a b c d", 1.0),
        ("a b c d a b c d", 4 / 5),  # abcd bcda cdab dabc abcd
        ("5000000", 2 / 4),  # 5000 0000 0000 0000
        ("no no no no no no", 1 / 3),
        ("x = 1, x = 1, x = 1,", 4 / 9),  # 12 words, of period 4
        ("一二一二一二", 2 / 3),
    ],
)
def test_distinct_ngrams(text, expected):
    assert distinct(text) == pytest.approx(expected)


def plainly_loops(text):
    """Every block at the end, of every length, compared as it is written."""
    text = "".join(text.split())
    for length in range(1, len(text) // REPEATS + 1):
        block, count = text[-length:], 0
        while text.endswith(block * (count + 1)):
            count += 1
        whole = block * count
        rest = text[: len(text) - len(whole)]
        partly = max(n for n in range(length) if n == 0 or rest.endswith(block[-n:]))
        if count >= REPEATS and len(whole) + partly >= LOOP_CHARACTERS:
            return True
    return False


@given(
    st.text("ab ", max_size=40), st.text("abc", min_size=1, max_size=24), st.integers(0, 40), st.text("ab", max_size=2)
)
def test_loops_against_the_plain_reference(before, block, count, after):
    text = before + block * count + after
    assert loops(text) == plainly_loops(text)


def test_a_loop_longer_than_what_is_read_is_none_and_long_answers_take_no_time():
    block = "".join(chr(0x4E00 + n) for n in range(READ_CHARACTERS // REPEATS))
    assert loops(block * REPEATS)
    assert not loops((block + "x") * REPEATS)
    started = time.perf_counter()
    assert repetition_of("a" * 400_000 + "b" + "a" * 400_000).loops
    assert time.perf_counter() - started < 5
