"""Answers of the engine are those of the library, whoever else is answered meanwhile; what is kept of them is right."""

import shutil
from dataclasses import fields

import pytest
import torch

import moe_bias as mb
from helpers.chatting import ask, running_engine, served_folder
from helpers.models import ARCHITECTURES, randomise, tiny_model
from helpers.saved import save_adapter
from moe_bias.config import LayerConfig
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.layer import entropy_from_logits
from moe_bias.progress import meter
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.rollout.policy import base_policy, layer_policy
from moe_bias.server.answer import Ended, Failed, Given
from moe_bias.server.engine import EngineClosedError
from moe_bias.support import RestScalars
from moe_bias.tasks.conversations import Example

PROMPT = [5, 6, 7, 8]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def twin(served):
    """The same model once more: the engine's own is not for two threads."""
    return mb.load(served[0].model.name_or_path, device="cpu")


def plain_answer(base: mb.Frozen, prompt, layer=None, seed=0, **choices):
    """By the library's own decoder, alone."""
    policy = base_policy if layer is None else layer_policy(layer, base.head.transform)
    given = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "stop_ids": [2], **choices}
    with meter("test", 1, "answers", visible=False) as bar:
        found = sampled_answers(base.model, base.head, [prompt], [policy], AnswerChoices(**given), [seed], bar)
    return found[0][0][0]


def layers(base, adapters):
    return {name: mb.load_layer(adapters / name, base) for name in ("one", "two")}


def test_rows_that_come_and_go_are_answered_as_the_library_answers_each_alone(served, twin):
    base, adapters = served
    known = layers(base, adapters)
    asked = [
        (prompt, name, seed, temperature, limit)
        for seed, (prompt, limit) in enumerate([(PROMPT, 12), ([9], 5), (PROMPT[:2], 20), ([30, 31, 32, 33, 34], 1)])
        for name in (None, "one", "two")
        for temperature in (0.0, 0.7)
    ]
    with running_engine(base, adapters, rows=5) as engine:
        heard = [
            ask(engine, prompt, (name,) if name else (), seed=seed, temperature=temperature, limit=limit)
            for prompt, name, seed, temperature, limit in asked
        ]
        for each, (prompt, name, seed, temperature, limit) in zip(heard, asked, strict=True):
            each.wait()
            expected = plain_answer(twin, prompt, known.get(name), seed, temperature=temperature, max_new_tokens=limit)
            assert each.answering.answer == expected
            assert each.text == base.tokenizer.decode(expected.token_ids, skip_special_tokens=True)
            assert each.end.reason == ("stop" if expected.finished else "length")
            assert each.end.tokens == len(expected.all_ids)
            assert each.end.prompt_tokens == len(prompt)


def test_a_cut_distribution_is_the_librarys(served, twin):
    base, adapters = served
    with running_engine(base, adapters) as engine:
        found = ask(engine, PROMPT, ("one",), seed=3, top_p=0.5, limit=12).wait()
    expected = plain_answer(twin, PROMPT, mb.load_layer(adapters / "one", base), 3, top_p=0.5)
    assert found.answering.answer == expected


def test_a_strength_is_the_requests_and_zero_is_the_plain_model(served, twin):
    base, adapters = served
    layer = mb.load_layer(adapters / "one", base)
    layer.strength = 0.3
    with running_engine(base, adapters) as engine:
        weak = ask(engine, PROMPT, ("one",), strengths={"one": 0.3}, seed=1, limit=12)
        none = ask(engine, PROMPT, ("one",), strengths={"one": 0.0}, seed=1, limit=12)
        assert weak.wait().answering.answer == plain_answer(twin, PROMPT, layer, 1)
        assert none.wait().answering.answer == plain_answer(twin, PROMPT, None, 1)


def test_a_strength_that_changes_counts_from_the_next_token_on(served):
    base, adapters = served
    with running_engine(base, adapters) as engine:
        heard = ask(engine, PROMPT, ("one",), temperature=0, limit=100, numbers=True, stops=("w1w1",))
        heard.next()
        heard.answering.set_strength(0.0)
        heard.wait()
        told = [part.numbers["adapters"][0]["strength"] for part in heard.written]
        assert told[0] == 1.0
        assert told[-1] == 0.0
        assert all(
            part.numbers["move"] == 0 for part, strength in zip(heard.written, told, strict=True) if not strength
        )
        with pytest.raises(mb.UserError, match="without the adapter 'two'"):
            heard.answering.set_strength(1.0, "two")


def test_several_adapters_add_each_at_its_strength(served, twin):
    base, adapters = served
    strengths = {"one": 0.4, "two": -1.5}

    def summed(hidden_BD, logits_BV):
        entropy_B = entropy_from_logits(logits_BV)
        for name, layer in layers(base, adapters).items():
            logits_BV = logits_BV + layer.on_vocabulary(strengths[name] * layer(hidden_BD, entropy_B).bias)
        return logits_BV

    with running_engine(base, adapters) as engine:
        heard = ask(engine, PROMPT, ("one", "two"), strengths=strengths, seed=5, limit=12, numbers=True).wait()
    choices = AnswerChoices(1, 1.0, 1.0, 12, [2])
    with meter("test", 1, "answers", visible=False) as bar:
        expected = sampled_answers(twin.model, twin.head, [PROMPT], [summed], choices, [5], bar)[0][0][0]
    assert heard.answering.answer == expected
    told = [(own["name"], own["strength"]) for own in heard.written[0].numbers["adapters"]]
    assert told == list(strengths.items())


def test_an_answer_keeps_the_version_it_began_with_and_the_next_has_the_new_one(served, twin, tmp_path):
    base, adapters = served
    shutil.copytree(adapters, tmp_path / "adapters")
    with running_engine(base, tmp_path / "adapters", rows=1) as engine:
        first = ask(engine, PROMPT, ("one",), seed=1, limit=12)
        waiting = ask(engine, PROMPT, ("one",), seed=1, limit=12)
        shutil.rmtree(tmp_path / "adapters" / "one")
        save_adapter(tmp_path / "adapters" / "one", base.model.name_or_path, num_experts=2)
        second = ask(engine, PROMPT, ("one",), seed=1, limit=12)
        old = plain_answer(twin, PROMPT, mb.load_layer(adapters / "one", base), 1)
        new = plain_answer(twin, PROMPT, mb.load_layer(tmp_path / "adapters" / "one", base), 1)
        assert first.wait().answering.answer == waiting.wait().answering.answer == old
        assert second.wait().answering.answer == new
        assert old != new


def test_a_conversation_computes_only_what_is_new_whatever_its_adapter(served, twin):
    base, adapters = served
    with running_engine(base, adapters) as engine:
        first = ask(engine, PROMPT, ("one",), seed=1, limit=6).wait()
        assert first.end.cached_tokens == 0
        written = first.answering.answer.token_ids
        again = ask(engine, PROMPT, (), seed=1, limit=6).wait()
        assert again.end.cached_tokens == len(PROMPT)
        turn = [*PROMPT, *written, 40, 41]
        next_turn = ask(engine, turn, ("two",), seed=2, limit=6).wait()
        assert next_turn.end.cached_tokens == len(PROMPT) + len(written) - 1
        expected = plain_answer(twin, turn, mb.load_layer(adapters / "two", base), 2, max_new_tokens=6)
        assert next_turn.answering.answer == expected


def test_an_answer_that_is_called_off_leaves_the_others_as_they_are(served, twin):
    base, adapters = served
    with running_engine(base, adapters, rows=2) as engine:
        gone = ask(engine, PROMPT, ("one",), temperature=0, limit=100, strengths={"one": 0.0})
        stays = ask(engine, [9, 10], ("one",), seed=4, limit=12)
        gone.next()
        gone.answering.call_off()
        expected = plain_answer(twin, [9, 10], mb.load_layer(adapters / "one", base), 4)
        assert stays.wait().answering.answer == expected
        assert ask(engine, PROMPT, limit=3).wait().end.cached_tokens == len(PROMPT)
    told = [gone.events.get_nowait() for _ in range(gone.events.qsize())]
    assert not any(isinstance(event, Ended | Failed) for event in told)


def same_features(found, expected):
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if other is None:
            assert one is None
        elif isinstance(one, RestScalars):
            same_features(one, other)
        else:
            assert one.dtype == other.dtype, field.name
            torch.testing.assert_close(one, other, msg=lambda text, name=field.name: f"{name}: {text}", **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("adapter", ["one", "two"])
def test_what_is_kept_of_an_answer_is_what_training_extracts(served, adapter, temperature):
    base, adapters = served
    kept = []
    with running_engine(base, adapters, kept.append) as engine:
        heard = ask(engine, PROMPT, (adapter,), seed=1, limit=12, temperature=temperature).wait()
        ask(engine, PROMPT, seed=1, limit=12).wait()
        ask(engine, PROMPT, ("one", "two"), limit=12).wait()
        (answer,) = kept
        (given,) = engine.features_of(PROMPT, [Given(heard.answering.answer.all_ids)], adapter)
        (found,) = engine.features_of(PROMPT, [Given.served(answer)], adapter)
        both = engine.features_of(PROMPT, [Given(answer.tokens), Given.served(answer, slice(2, 5))], adapter)
    assert (answer.id, answer.adapter, answer.prompt) == (heard.answering.id, adapter, PROMPT)
    assert answer.tokens == heard.answering.answer.all_ids
    assert answer.finished == (heard.end.reason == "stop")
    tokens = run_backbone(base.model, [Example(PROMPT, answer.tokens)], 1, "")
    support = mb.load_layer(adapters / adapter, base).support_or_all().tolist()
    expected = with_scalars(base.head, tokens, support, "")
    for each in (found, given, both[0]):
        same_features(each, expected)
    same_features(both[1], expected.at(slice(2, 5)))


def test_features_of_an_edited_answer_are_those_of_its_whole_text(served):
    base, adapters = served
    with running_engine(base, adapters) as engine:
        heard = ask(engine, PROMPT, ("one",), seed=1, limit=12).wait()
        written = heard.answering.answer.token_ids
        edited = [*written[:3], 50, 51, 2]
        (found,) = engine.features_of(PROMPT, [Given(edited)], "one")
        support = mb.load_layer(adapters / "one", base).support_or_all().tolist()
        with pytest.raises(mb.UserError, match="no adapter 'three'"):
            engine.features_of(PROMPT, [Given(edited)], "three")
        with pytest.raises(mb.UserError, match="one token or more"):
            engine.features_of(PROMPT, [Given([])], "one")
    tokens = run_backbone(base.model, [Example(PROMPT, edited)], 1, "")
    same_features(found, with_scalars(base.head, tokens, support, ""))


def test_numbers_of_a_token_are_those_of_both_distributions(served):
    base, adapters = served
    layer = mb.load_layer(adapters / "one", base)
    with running_engine(base, adapters) as engine:
        heard = ask(engine, PROMPT, ("one",), seed=1, limit=12, numbers=True, temperature=0.5).wait()
    answer = heard.answering.answer
    tokens = run_backbone(base.model, [Example(PROMPT, answer.all_ids)], 1, "")
    logits_TV = base.head.logits(tokens.hidden)
    policy_TV = layer_policy(layer, base.head.transform)(tokens.hidden, logits_TV)
    assert len(heard.written) == len(answer.token_ids)
    for place, part in enumerate(heard.written):
        base_V, adapted_V = logits_TV[place].softmax(-1), policy_TV[place].softmax(-1)
        numbers = part.numbers
        assert numbers["id"] == answer.token_ids[place]
        assert numbers["entropy"] == pytest.approx(float(entropy_from_logits(logits_TV[place])), rel=1e-3)
        assert numbers["adapted_entropy"] == pytest.approx(float(entropy_from_logits(policy_TV[place])), rel=1e-3)
        assert numbers["kl"] == pytest.approx(float((adapted_V * (adapted_V / base_V).log()).sum()), rel=1e-3, abs=1e-5)
        assert numbers["move"] == pytest.approx(float((policy_TV[place] - logits_TV[place]).abs().max()), rel=1e-3)
        assert numbers["flip"] == bool(base_V.argmax() != adapted_V.argmax())
        assert numbers["base"][0] == [f"w{int(base_V.argmax())}", pytest.approx(float(base_V.max()), rel=1e-3)]
        (own,) = numbers["adapters"]
        assert (own["name"], own["strength"]) == ("one", 1.0)
        gates = layer.route(tokens.hidden[place]).gates
        assert dict(map(tuple, own["experts"])) == {
            expert: pytest.approx(float(gates[expert]), rel=1e-3) for expert in gates.nonzero().flatten().tolist()
        }
    assert any(part.numbers["flip"] for part in heard.written)


def test_a_keeper_that_fails_costs_nobody_the_answer(served, caplog):
    base, adapters = served

    def fails(answer):
        raise RuntimeError("full")

    with running_engine(base, adapters, fails) as engine:
        assert isinstance(ask(engine, PROMPT, ("one",), limit=3).wait().end, Ended)
        assert isinstance(ask(engine, PROMPT, ("one",), limit=3).wait().end, Ended)
    assert "an answer was not kept" in caplog.text


def test_a_model_that_fails_fails_its_answers_and_the_next_is_answered(served, monkeypatch, caplog):
    base, adapters = served
    with running_engine(base, adapters) as engine:
        expected = ask(engine, PROMPT, seed=1, limit=6).wait().answering.answer
        with monkeypatch.context() as patch:
            patch.setattr("moe_bias.server.batch.hidden_after", lambda *args: 1 / 0)
            failed = ask(engine, PROMPT, limit=6).wait().end
        assert isinstance(failed, Failed)
        assert "division by zero" in failed.sentence
        assert ask(engine, PROMPT, seed=1, limit=6).wait().answering.answer == expected


def test_what_waits_is_told_when_the_engine_ends(served):
    base, adapters = served
    with running_engine(base, adapters, rows=1) as engine:
        heard = [ask(engine, PROMPT, limit=100, temperature=0, stops=("w",)) for _ in range(3)]
    assert all(isinstance(each.wait().end, Failed | Ended) for each in heard)
    with pytest.raises(EngineClosedError):
        ask(engine, PROMPT)
    with pytest.raises(EngineClosedError):
        engine.call(lambda: 1)


def test_calls_run_on_the_engines_thread_and_raise_there_what_they_raise(served):
    base, _ = served
    with running_engine(base, None) as engine:
        assert engine.call(lambda: 3) == 3
        with pytest.raises(KeyError):
            engine.call(lambda: {}["a"])
        with pytest.raises(mb.UserError, match="without a folder"):
            engine.version("one")
        assert engine.adapters == []


def test_no_adapters_where_the_folder_is_none(served, tmp_path):
    with pytest.raises(mb.UserError, match="is not a folder"), running_engine(served[0], tmp_path / "none"):
        pass


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_answers_as_alone(name, tmp_path, served):
    base, twin = (mb.Frozen(tiny_model(name), served[0].tokenizer) for _ in range(2))
    layer = base.head.layer(LayerConfig(experts="linear", num_experts=3, expert_rank=2))
    randomise(layer, scale=0.3)
    mb.save(layer, tmp_path / "one", base)
    with running_engine(base, tmp_path) as engine:
        heard = [ask(engine, prompt, ("one",), seed=1, limit=8) for prompt in (PROMPT, [9], PROMPT)]
        for each, prompt in zip(heard, (PROMPT, [9], PROMPT), strict=True):
            assert each.wait().answering.answer == plain_answer(twin, prompt, layer, 1, max_new_tokens=8)
