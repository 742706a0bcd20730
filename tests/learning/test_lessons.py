import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.lessons import LIMIT, answer, edit, rewarded
from helpers.models import VOCABULARY
from moe_bias.learning.lessons import Batch, Lesson, highest, pair_lesson, reward_lesson
from moe_bias.mistakes import UserError

TOKENS = st.lists(st.integers(3, 9), min_size=1, max_size=8)


@given(better=TOKENS, other=TOKENS)
def test_a_pair_keeps_of_the_other_answer_what_differs(better, other):
    if better == other:
        with pytest.raises(UserError, match="token for token"):
            pair_lesson(answer(better), answer(other), LIMIT)
        return
    lesson = pair_lesson(answer(better), answer(other), LIMIT)
    features, counts = lesson.features, lesson.counts
    common = next(
        (i for i, (a, b) in enumerate(zip(better, other, strict=False)) if a != b), min(map(len, (better, other)))
    )
    start = min(common, len(other) - 1)
    assert features.token.tolist() == better + other[start:]
    assert features.example.tolist() == [0] * len(better) + [1] * (len(other) - start)
    assert features.position.tolist() == [*range(len(better)), *range(start, len(other))]
    # The tokens that count are the same up to the first that differs, so that both sides of the preference are whole.
    counted = features.token[counts & (features.example == 0)].tolist()
    assert counted == better[start:]


@given(better=TOKENS, other=TOKENS, limit=st.integers(1, 9))
def test_beyond_the_limit_nothing_is_kept(better, other, limit):
    if better == other:
        return
    if better[:limit] == other[:limit] and min(len(better), len(other)) >= limit:
        with pytest.raises(UserError, match="lesson_tokens"):
            pair_lesson(answer(better), answer(other), limit)
        return
    assert int(pair_lesson(answer(better), answer(other), limit).features.position.max()) < limit


@pytest.mark.parametrize("lesson", [edit(), rewarded(-0.5)])
def test_a_lesson_is_what_its_tensors_say(lesson):
    again = Lesson.of(lesson.tensors(), VOCABULARY, lesson.reward)
    assert again.reward == lesson.reward
    for name in ("hidden", "token", "example", "position", "logit", "entropy", "log_partition", "column", "support"):
        assert torch.equal(getattr(again.features, name), getattr(lesson.features, name)), name
    assert torch.equal(again.features.rest.log_sum_exp, lesson.features.rest.log_sum_exp)
    assert torch.equal(again.features.rest.mean_logit, lesson.features.rest.mean_logit)


@pytest.mark.parametrize("reward", [1.5, -2, float("nan")])
def test_a_reward_out_of_its_range_is_refused(reward):
    with pytest.raises(UserError, match="from -1 to 1"):
        reward_lesson(answer([4, 5]), reward, LIMIT)


@given(values=st.lists(st.floats(0, 5, width=32), min_size=1, max_size=20), share=st.floats(0.01, 1))
def test_the_highest_are_a_share_and_at_least_one(values, share):
    value_T = torch.tensor(values)
    chosen_T = highest(value_T, share)
    count = int(chosen_T.sum())
    assert max(share * len(values), 1) <= count < share * len(values) + 1 + 1e-9 or count == 1
    if not chosen_T.all():
        assert value_T[chosen_T].min() >= value_T[~chosen_T].max()


def test_a_batch_has_pairs_first_and_numbers_its_answers_on():
    batch = Batch.of([rewarded(1.0, length=10), edit(1), rewarded(-1.0, 2), edit(3)], rho=0.2)
    assert batch.pairs == 2
    assert batch.reward.tolist() == [1.0, -1.0]
    assert batch.features.example.unique_consecutive().tolist() == [0, 1, 2, 3, 4, 5]
    assert int(batch.counts[batch.features.example == 4].sum()) == 2
    assert int(batch.counts[batch.features.example == 5].sum()) == 1
