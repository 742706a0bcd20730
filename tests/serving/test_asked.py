"""What a request says of adapters, read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bias.mistakes import UserError
from moe_bias.serving.asked import asked_adapters

THERE = ("formal", "medical", "a+b")
names = st.text(st.characters(exclude_characters="+{", exclude_categories=["Cs"]), min_size=1, max_size=5)


def asked(given, strength=None):
    return asked_adapters(given, strength, lambda: THERE)


@pytest.mark.parametrize(
    ("given", "strength", "expected"),
    [
        ("formal", None, {"formal": None}),
        ("formal", 0.5, {"formal": 0.5}),
        ("absent", 2, {"absent": 2.0}),
        ("medical+formal", None, {"formal": None, "medical": None}),
        ("a+b", 0.5, {"a+b": 0.5}),  # its own name
        ("a+b+formal", None, {"a": None, "b": None, "formal": None}),  # refused later: there is no 'a'
        ({"formal": 0.7, "a+b": -1}, None, {"a+b": -1.0, "formal": 0.7}),
        (' {"formal": 0.7, "medical": 1}', None, {"formal": 0.7, "medical": 1.0}),
        ({"formal": 0}, None, {"formal": 0.0}),
    ],
)
def test_every_form(given, strength, expected):
    found = asked(given, strength)
    assert list(found.items()) == list(expected.items())


@given(mapping=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_the_same_mapping_in_another_order_is_the_same_work(mapping):
    backwards = dict(reversed(mapping.items()))
    assert list(asked(mapping).items()) == list(asked(backwards).items())


@pytest.mark.parametrize(
    ("given", "strength", "reason"),
    [
        (None, 1.0, "must be the name of an adapter, or a mapping of names to strengths, got None"),
        (["formal"], None, r"or a mapping of names to strengths, got \['formal'\]"),
        ({3: 1.0}, None, r"or a mapping of names to strengths, got \{3: 1.0\}"),
        ({}, None, "is an empty mapping"),
        ("{}", None, "is an empty mapping"),
        ({"formal": 1.0}, 0.5, "stands beside a mapping in 'moe_bias'; give each adapter's strength"),
        ("formal+medical", 0.5, r"stands beside the several adapters 'formal\+medical'; give a mapping"),
        ("formal+formal", None, r"'formal\+formal' names the adapter 'formal' twice"),
        ('{"formal": 1, "formal": 1}', None, "'moe_bias' names the adapter 'formal' twice"),
        ('{"formal": 1', None, """is '{"formal": 1', which is no JSON object"""),
        ('{"formal": ' + "[" * 100_000, None, "which is no JSON object"),
        ('{"formal": ' + "9" * 5000 + "}", None, "which is no JSON object"),
        ("{'formal': 1}", None, "which is no JSON object"),
        ({"formal": None}, None, "the strength of 'formal' must be a finite number, got None"),
        ({"formal": True}, None, "must be a finite number, got True"),
        ({"formal": float("nan")}, None, "must be a finite number, got nan"),
        ('{"formal": Infinity}', None, "must be a finite number, got inf"),
        ({"formal": "1"}, None, "must be a finite number, got '1'"),
        ({"formal": 10**400}, None, "must be a finite number, got 1000"),
        ("formal", "much", "'moe_bias_strength' must be a finite number, got 'much'"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(given, strength, reason):
    with pytest.raises(UserError, match=reason) as refused:
        asked(given, strength)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_number_that_python_does_not_write_down_is_refused():
    with pytest.raises(UserError, match="must be a finite number, got a int too large"):
        asked("formal", 10**5000)
