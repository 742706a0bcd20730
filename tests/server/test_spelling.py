"""Growing text is the text of all tokens, cut before a stop, whatever the tokens are cut at."""

from hypothesis import given
from hypothesis import strategies as st

from moe_bias.server.spelling import GrowingText

LETTERS = st.text(alphabet="ab é猫🙂\n", max_size=20)


def by_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def with_leading_space_cut(ids):
    """As tokenizers of words: a text has no space before its first."""
    return " ".join(f"w{token}" for token in ids)


@given(LETTERS, st.lists(st.text(alphabet="ab é猫", min_size=1, max_size=4), max_size=3))
def test_bytes_become_letters_and_the_text_ends_before_a_stop(text, stops):
    growing, told = GrowingText(by_bytes, stops), ""
    for token in text.encode():
        told += growing.add(token)
        assert "�" not in told
        if growing.stopped:
            break
    told += growing.finish()
    ends = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    assert told == growing.text
    assert growing.stopped == bool(ends)
    # the stop that is complete first ends the text, and an answer is asked for no more tokens then
    assert told == text[: min(ends)] if ends and len(stops) == 1 else text.startswith(told)
    if not ends:
        assert told == text


@given(st.lists(st.integers(0, 99), max_size=30))
def test_words_keep_the_spaces_between_them(ids):
    growing = GrowingText(with_leading_space_cut, ())
    assert "".join([*map(growing.add, ids), growing.finish()]) == with_leading_space_cut(ids)


def test_broken_letters_at_the_end_are_told_when_it_is_over():
    growing = GrowingText(by_bytes, ())
    assert [growing.add(token) for token in "é".encode()[:1]] == [""]
    assert growing.finish() == "�"
