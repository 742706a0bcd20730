"""A draft that is brought nearer to a target from Python, its figures by hand, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moe_bias as mb
from helpers.models import VOCABULARY
from helpers.saved import save_model
from moe_bias.divergence import acceptance
from moe_bias.evaluation.drafts import DraftTokens, draft_figures, tokens_of_passes
from moe_bias.features.extract import completion_hidden
from moe_bias.mistakes import UserError

SMALL = {"experts": "free", "num_experts": 2, "top_k": 1, "expert_rate": 0.1, "batch_tokens": 16}
ROWS = [{"question": f"w{5 + n} w6", "answer": f"w{9 + n % 3} w{20 + n % 5} w{9 + n % 3}"} for n in range(30)]


@pytest.fixture
def pair(folder, monkeypatch):
    """A draft and a wider target."""
    monkeypatch.setenv("MOE_BIAS_CACHE", str(folder / "cache"))
    draft = mb.load(save_model(folder / "draft"), device="cpu")
    target = mb.load(save_model(folder / "target", hidden_size=24), device="cpu")
    return SimpleNamespace(draft=draft, target=target, folder=folder)


def data_of(base, **more):
    return mb.extract(base, ROWS, **{"held_out": 0.3, "support": "auto:40", "batch_size": 4, **more})


def test_a_draft_is_brought_nearer_and_saved_with_its_record(pair):
    data, steps = data_of(pair.draft), []
    watch = SimpleNamespace(on_step=lambda step, metrics, layer: steps.append(step))
    config = mb.DraftConfig(**SMALL, epochs=20)
    output = pair.folder / "out"
    layer, report = mb.train_draft(pair.draft, pair.target, data, config, output=output, callbacks=[watch])
    plain, adapted = report.figures["plain"], report.figures["adapted"]
    assert adapted.kl.value < 0.8 * plain.kl.value
    assert adapted.accepted.value > plain.accepted.value
    assert adapted.rejected.value == pytest.approx((1 - adapted.accepted.value) / (1 - plain.accepted.value))
    assert adapted.rejected.high < 1
    assert report.layer_loss == pytest.approx(adapted.kl.value, rel=1e-4)
    assert 0 < report.support_mass < 1
    assert steps[-1] == report.steps
    assert "Of the tokens that the target rejects" in report.title
    record = json.loads((output / "record.json").read_text())
    assert record["kind"] == "train draft"
    assert record["settings"]["target"] == str(pair.folder / "target")
    assert record["rows"][1]["accepted"]["value"] == adapted.accepted.value
    loaded = mb.load_layer(output, pair.draft)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    with pytest.raises(UserError, match="holds an adapter already"):
        mb.train_draft(pair.draft, pair.target, data, config, output=output)


def test_figures_are_those_of_both_models_themselves(pair):
    """By a pass of each model over the held-out answers, without stores, supports or scalars."""
    data = data_of(pair.draft)
    config = mb.DraftConfig(**SMALL, epochs=3, reverse=0.5)
    layer, report = mb.train_draft(pair.draft, pair.target, data, config)
    _, held_out = data.examples()
    sums = {"plain": 0.0, "adapted": 0.0}
    tokens = 0
    for example in held_out:
        (hidden_TD,), (wide_TD,) = (list(completion_hidden(one.model, [example])) for one in (pair.draft, pair.target))
        logits_TV, target_TV = pair.draft.head.logits(hidden_TD), pair.target.head.logits(wide_TD)
        entropy_T = torch.distributions.Categorical(logits=logits_TV).entropy()
        adapted_TV = logits_TV.index_add(-1, layer.support, layer(hidden_TD, entropy_T).bias.detach())
        for name, policy_TV in (("plain", logits_TV), ("adapted", adapted_TV)):
            sums[name] += float(torch.minimum(policy_TV.softmax(-1), target_TV.softmax(-1)).sum())
        tokens += len(hidden_TD)
    for name, total in sums.items():
        assert report.figures[name].accepted.value == pytest.approx(total / tokens, rel=1e-5)
    assert report.held_out_tokens == tokens


def test_an_embedding_that_is_padded_further_makes_no_difference_to_training(pair):
    """As those of two sizes of Qwen are: the same tokens, more rows."""
    wider = mb.load(save_model(pair.folder / "wider", hidden_size=24, vocab_size=VOCABULARY + 7), device="cpu")
    support = list(range(3, 60))
    data = data_of(pair.draft, support=support)
    _, report = mb.train_draft(pair.draft, wider, data, mb.DraftConfig(**SMALL, epochs=10))
    assert report.figures["adapted"].kl.value < report.figures["plain"].kl.value
    assert report.layer_loss == pytest.approx(report.figures["adapted"].kl.value, rel=1e-4)
    data = data_of(wider, support=support)
    layer, report = mb.train_draft(wider, pair.draft, data, mb.DraftConfig(**SMALL, epochs=10))
    assert report.figures["adapted"].kl.value < report.figures["plain"].kl.value
    assert report.layer_loss == pytest.approx(report.figures["adapted"].kl.value, rel=1e-4)
    assert layer.vocab_size == VOCABULARY + 7
    with pytest.raises(UserError, match="has token id 103, and the target has rows for 97 tokens"):
        mb.train_draft(wider, pair.draft, data, mb.DraftConfig(**SMALL, support="all"))


def test_a_layer_is_trained_on_and_the_target_s_states_are_found_again(pair, capsys):
    data = data_of(pair.draft)
    layer, first = mb.train_draft(pair.draft, pair.target, data, mb.DraftConfig(**SMALL, epochs=1))
    capsys.readouterr()
    _, second = mb.train_draft(pair.draft, pair.target, data, mb.DraftConfig(**SMALL, epochs=9), layer=layer)
    assert second.figures["adapted"].kl.value < first.figures["adapted"].kl.value
    assert "hidden states found in" in capsys.readouterr().out


class Unlikely(mb.Objective):
    needs_target = True

    def __call__(self, now, then):
        return mb.Terms(now.reverse_kl + now.forward_kl, {"both": now.reverse_kl + now.forward_kl})


def test_one_s_own_objective_may_read_the_target(pair):
    _, report = mb.train_draft(
        pair.draft,
        pair.target,
        data_of(pair.draft),
        mb.DraftConfig(**SMALL, epochs=3),
        objective=Unlikely(),
        keep=False,
    )
    assert report.curve[-1]["both"] < report.curve[1]["both"]
    assert len(list((pair.folder / "cache" / "features").iterdir())) == 1  # the draft's own


def test_own_answers_are_the_model_s_and_go_on_in_their_folder(pair):
    own = pair.folder / "own"
    found = mb.own_answers(pair.target, ROWS, max_new_tokens=6, temperature=0, folder=own, batch_size=4)
    answers = [conversation.completion for conversation in found.texts.conversations]
    assert answers[3] == mb.generate(pair.target, ROWS[3]["question"], max_new_tokens=6)
    lines = (own / "own-answers.jsonl").read_text().splitlines(keepends=True)
    (own / "own-answers.jsonl").write_text("".join(lines[:9]) + lines[9][:5])
    again = mb.own_answers(pair.target, ROWS, max_new_tokens=6, temperature=0, folder=own, batch_size=7)
    assert [conversation.completion for conversation in again.texts.conversations] == answers
    with pytest.raises(UserError, match="holds answers of another model or to other prompts"):
        mb.own_answers(pair.draft, ROWS, max_new_tokens=6, temperature=0, folder=own)
    data = mb.extract(pair.draft, found, held_out=0.3, support="auto:40")
    _, report = mb.train_draft(pair.draft, pair.target, data, mb.DraftConfig(**SMALL, epochs=2))
    assert report.train_tokens == len(data.store) - report.held_out_tokens


def test_sampled_answers_do_not_depend_on_the_batch(pair):
    texts = [
        [c.completion for c in mb.own_answers(pair.draft, ROWS, max_new_tokens=5, batch_size=size).texts.conversations]
        for size in (1, 30)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 15


def test_models_of_other_vocabularies_are_refused_by_the_token(pair):
    other = mb.load(save_model(pair.folder / "other", word="v"), device="cpu")
    with pytest.raises(UserError, match="token id 0 is 'w0' of the draft and 'v0' of the target: a draft needs"):
        mb.train_draft(pair.draft, other, data_of(pair.draft))
    with pytest.raises(UserError, match=r"`large` is 'name', no frozen model; moe_bias\.load\('name'\)"):
        mb.train_draft(pair.draft, "name", data_of(pair.draft))


def test_data_without_texts_and_of_a_part_of_the_tokens_is_refused(pair):
    kept = data_of(pair.draft, keep=str(pair.folder / "store"))
    bare = mb.extract(pair.draft, str(pair.folder / "store"), held_out=0.3)
    with pytest.raises(UserError, match="`data` is a feature store alone, and the target reads its texts"):
        mb.train_draft(pair.draft, pair.target, bare)
    with pytest.raises(UserError, match=r"`data` is of another frozen model than `base`"):
        mb.train_draft(pair.target, pair.draft, kept)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -1}, "`temperature` is -1; give 0, which is greedy, or more"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; give a number from 1"),
    ],
)
def test_values_that_cannot_be_sampled_with_are_refused(pair, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        mb.own_answers(pair.draft, ROWS, **wrong)


def test_tokens_of_a_pass_by_hand():
    """Of accepted shares a, b, c with two drafts a pass: 1 + a + ab from the first, 1 + b + bc from the second."""
    acceptance_T, example_T = torch.tensor([0.5, 0.8, 0.9, 0.4]), torch.tensor([0, 0, 0, 1])
    sums, counts = tokens_of_passes(acceptance_T, example_T, 2)
    np.testing.assert_allclose(sums, [(1 + 0.5 + 0.4) + (1 + 0.8 + 0.72), 1.4], rtol=1e-6)
    np.testing.assert_array_equal(counts, [2, 1])


def test_figures_by_hand():
    example_T = torch.tensor([0, 0, 1])
    plain = DraftTokens(torch.tensor([0.5, 0.5, 0.8]), torch.tensor([1.0, 0.4, 0.1]), torch.tensor([True, False, True]))
    better = DraftTokens(torch.tensor([0.7, 0.5, 0.9]), torch.tensor([0.5, 0.4, 0.0]), torch.tensor([True, True, True]))
    found = draft_figures({"plain": plain, "better": better}, example_T, lambda sums: sums)
    assert found["plain"].accepted.value == pytest.approx(1.8 / 3)
    assert found["plain"].rejected is None
    assert found["better"].rejected.value == pytest.approx(0.9 / 1.2)
    assert found["better"].kl.value == pytest.approx(0.3)
    assert found["plain"].agreement.value == pytest.approx(2 / 3)


def test_a_draft_that_is_its_own_target_is_always_accepted(pair):
    data = data_of(pair.draft)
    _, report = mb.train_draft(pair.draft, pair.draft, data, mb.DraftConfig(**SMALL, epochs=1))
    assert report.figures["plain"].accepted.value == pytest.approx(1, abs=1e-6)
    assert report.figures["plain"].tokens.value == pytest.approx(5, abs=1e-6)
    assert report.figures["adapted"].rejected is None  # nothing was
    assert "accepts" in report.title
    assert acceptance(torch.zeros(1, 5), torch.zeros(1, 5)) == pytest.approx(1)
