"""Hidden states that an engine keeps for learning, against transformers: of answers and of prompts."""

import pytest
import torch

from helpers.served import HIDDEN, WITHOUT_VLLM, running

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from helpers.asking import ask, greedy, prompts
from moe_bias.serving.following import add_follower, remove_follower
from moe_bias.serving.keeping import KEEP
from moe_bias.serving.kept_answers import AnswerKeeping, KeptFile
from moe_bias.serving.notes import kept_states
from moe_bias.serving.recording import RowLayout
from moe_bias.variables import LEARNING

LAYOUT = RowLayout.of_model(HIDDEN, torch.float32)


@pytest.fixture(scope="module")
def engine(served):
    """It takes prompts in parts of a few tokens, and writes answers beside."""
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LEARNING, "{}")
        with running(*served, **chunked) as started:
            yield started


@pytest.fixture
def answers(engine):
    """The answers that were kept since."""
    found = []
    follower = AnswerKeeping(kept_states(LAYOUT), found.append)
    add_follower(follower)
    yield found
    remove_follower(follower)


@torch.no_grad()
def expected_states(reference, prompt, tokens):
    """What each of the tokens is chosen from, by transformers."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    return reference(None).model(ids).last_hidden_state[0, len(prompt) - 1 :]


def kept_prompt(engine, tokens, start):
    """The states from a position on, and which are there; beside other requests."""
    file = KeptFile(kept_states(LAYOUT), len(tokens) - start)
    params = SamplingParams(temperature=0, max_tokens=1, extra_args={KEEP: file.asked(start)})
    others = [(prompt, greedy("routed", tokens=6)) for prompt in prompts(3, seed=7)]
    ask(engine, [*others[:2], (tokens, params), others[2]])
    return file.read_some()


def test_states_of_answers_are_those_of_transformers(engine, answers, reference):
    asked = [
        (prompt, greedy(name, tokens=9))
        for prompt, name in zip(prompts(4), ["routed", "far", None, "whole"], strict=True)
    ]
    sampled = SamplingParams(temperature=1.0, max_tokens=7, extra_args={"moe_bias": "static"})
    told = ask(engine, [*asked, (prompts(5)[4], sampled)])
    by_prompt = {tuple(answer.prompt): answer for answer in answers}
    assert {answer.adapter for answer in answers} == {"routed", "far", "whole", "static"}
    for (prompt, params), found in zip([*asked, (prompts(5)[4], sampled)], told, strict=True):
        if (params.extra_args or {}).get("moe_bias") is None:
            assert tuple(prompt) not in by_prompt
            continue
        kept = by_prompt[tuple(prompt)]
        assert kept.tokens == list(found.token_ids)
        torch.testing.assert_close(kept.hidden, expected_states(reference, prompt, kept.tokens), atol=1e-4, rtol=1e-4)


def test_states_of_a_prompt_are_those_of_transformers(engine, reference):
    for number, prompt in enumerate(prompts(3, seed=11)):
        tokens = [*prompt, *prompts(1, seed=20 + number)[0]]
        hidden_TD, there_T = kept_prompt(engine, tokens, len(prompt) - 1)
        assert there_T.all()
        expected_TD = expected_states(reference, prompt, [*tokens[len(prompt) :], 0])
        torch.testing.assert_close(hidden_TD, expected_TD, atol=1e-4, rtol=1e-4)


def test_positions_whose_keys_are_there_already_are_empty_and_never_wrong(engine, reference):
    tokens = [(7 * place) % 90 + 2 for place in range(150)]
    kept_prompt(engine, tokens, 0)
    hidden_TD, there_T = kept_prompt(engine, [*tokens, 5, 6], 0)
    assert not there_T[0]
    assert there_T[-2:].all()
    expected_TD = expected_states(reference, tokens[:1], [*tokens[1:], 5, 6, 0])
    torch.testing.assert_close(hidden_TD[there_T], expected_TD[there_T], atol=1e-4, rtol=1e-4)


def test_files_go_with_their_requests(engine, answers):
    folder = kept_states(LAYOUT).folder
    ask(engine, [(prompts(1)[0], greedy("routed", tokens=4))])
    answers.clear()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("keep", [["absent", 0, 5], ["../x", 0, 1], "x", [1, 2, 3], [], {}])
def test_what_is_no_file_of_the_servers_is_refused(engine, keep):
    with pytest.raises(VLLMValidationError, match=r"no plain file name|cannot be opened|the server's own requests"):
        ask(engine, [(prompts(1)[0], SamplingParams(max_tokens=1, extra_args={KEEP: keep}))])
