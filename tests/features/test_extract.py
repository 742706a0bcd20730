import pytest
import torch

from helpers.models import VOCABULARY, tiny_model
from moe_bias.backbone import Head, find_head
from moe_bias.chunks import AtOnce
from moe_bias.features import extract
from moe_bias.features.extract import (
    fork_coverage,
    measure_fork_mass,
    run_backbone,
    support_for,
    with_scalars,
)
from moe_bias.support import fork_threshold
from moe_bias.tasks.conversations import Example

EXAMPLES = [Example([5, 6, 7], [8, 9, 2]), Example([5], [11, 2]), Example([20, 21, 22, 23, 24], [3])]
SUPPORT = [2, 8, 11, 40]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_features_are_what_the_model_computes_for_each_completion_token(name, batch_size):
    model = tiny_model(name)
    head = find_head(model)[1]
    features = with_scalars(head, run_backbone(model, EXAMPLES, batch_size, "test"), SUPPORT, "test")
    assert features.token.tolist() == [8, 9, 2, 11, 2, 3]
    assert features.example.tolist() == [0, 0, 0, 1, 1, 2]
    assert features.column.tolist() == [1, -1, 0, 2, 0, -1]
    rest = [token for token in range(VOCABULARY) if token not in SUPPORT]
    row = 0
    for example in EXAMPLES:
        ids = example.prompt_ids + example.completion_ids
        logits_LV = model(torch.tensor([ids])).logits[0].double()
        for position in range(len(example.prompt_ids), len(ids)):
            logits_V = logits_LV[position - 1]
            prob_V = logits_V.softmax(-1)
            found = [features.logit[row], features.entropy[row], features.rest.log_sum_exp[row]]
            expected = [logits_V[ids[position]], -(prob_V * prob_V.log()).sum(), logits_V[rest].logsumexp(-1)]
            torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
            mean = (logits_V[rest].softmax(-1) * logits_V[rest]).sum()
            torch.testing.assert_close(features.rest.mean_logit[row], mean, rtol=1e-5, atol=1e-5)
            row += 1


@pytest.mark.parametrize("elements", [1, 4 * VOCABULARY])
def test_logits_are_held_for_a_chunk_of_tokens(monkeypatch, elements):
    model = tiny_model()
    head = find_head(model)[1]
    tokens = run_backbone(model, EXAMPLES, 3, "test")
    whole = with_scalars(head, tokens, SUPPORT, "test")
    monkeypatch.setattr(extract, "LOGITS", AtOnce(elements, elements))
    held = []
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, hidden: held.append(len(hidden)) or logits(head, hidden))
    chunked = with_scalars(head, tokens, SUPPORT, "test")
    assert max(held) == max(elements // VOCABULARY, 1)
    for name in ("logit", "entropy", "log_partition"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name))
    assert whole.position.tolist() == [0, 1, 2, 0, 1, 0]


def test_support_holds_what_it_must_then_frequent_targets_then_fork_mass():
    model = tiny_model()
    head = find_head(model)[1]
    tokens = run_backbone(model, EXAMPLES, 2, "test")
    forks = measure_fork_mass(head, tokens.hidden, rho=0.5)
    assert support_for(forks, tokens.token, 2, always=[1]) == [1, 2]  # token 2 is the only target seen twice
    support = support_for(forks, tokens.token, 9, always=[1])
    assert {1, 2, 3, 8, 9, 11} <= set(support)
    others = set(support) - {1, 2, 3, 8, 9, 11}
    best = [t for t in forks.mass.argsort(descending=True).tolist() if t not in {1, 2, 3, 8, 9, 11}]
    assert others == set(best[:3])
    assert support == sorted(support)


def test_fork_mass_by_the_definition():
    model = tiny_model()
    head = find_head(model)[1]
    hidden_TD = run_backbone(model, EXAMPLES, 2, "test").hidden
    prob_TV = head.logits(hidden_TD).double().softmax(-1)
    entropy_T = -(prob_TV * prob_TV.log()).sum(-1)
    forks = measure_fork_mass(head, hidden_TD, rho=0.5)
    assert forks.threshold == pytest.approx(fork_threshold(entropy_T, 0.5), abs=1e-5)
    expected_V = prob_TV[entropy_T.topk(3).indices].sum(0)
    torch.testing.assert_close(forks.mass, expected_V, rtol=1e-5, atol=1e-7)
    assert fork_coverage(forks, range(VOCABULARY)) == pytest.approx(1)
    assert fork_coverage(forks, SUPPORT) == pytest.approx(float(expected_V[SUPPORT].sum() / 3), rel=1e-5)
