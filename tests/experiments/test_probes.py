"""The probes beside plain references: the whole vocabulary's softmax, and the formulas token by token."""

import pytest
import torch
import torch.nn.functional as F

from helpers.models import HIDDEN, VOCABULARY
from helpers.training import SUPPORT, features_of, head_of
from moe_bias.experiments.headroom import seen_by
from moe_bias.experiments.probes import Choice, HiddenNetwork, candidates_of, choice_log_prob, choice_seen
from moe_bias.features.base_logits import BaseLogits


@pytest.mark.parametrize("name", ["llama", "granite"])
@pytest.mark.parametrize(("support", "top"), [(SUPPORT, 5), (list(range(VOCABULARY)), 20), (list(range(5, 12)), 20)])
def test_choice_is_the_softmax_over_the_whole_vocabulary(name, support, top):
    """In float64, moved at the candidates alone; targets lie among them, beside them and off the support."""
    head = head_of(name)
    features = features_of(head, support=support)
    candidates = candidates_of(features, head, BaseLogits(features, head, 2**20), top)
    top = min(top, len(support))
    moves_TK = torch.randn(len(features), top, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_TV = head.logits(features.hidden).double()
    support_M = torch.tensor(support)
    best_TK = logits_TV[:, support_M].topk(top).indices
    moved_TV = logits_TV.scatter_add(1, support_M[best_TK], moves_TK)
    wanted_T = moved_TV.log_softmax(-1).gather(1, features.token[:, None])[:, 0]
    found_T = choice_log_prob(candidates.log_prob.double() + moves_TK, candidates)
    torch.testing.assert_close(found_T, wanted_T, rtol=0, atol=2e-5)
    assert (candidates.column == best_TK).all()


def test_a_fresh_probe_is_the_base():
    head, features = head_of(), features_of(head_of())
    logits = BaseLogits(features, head, 2**20)
    base = seen_by(None, features, head, logits)
    network = HiddenNetwork(head, 8, tuple(SUPPORT))
    torch.testing.assert_close(seen_by(network, features, head, logits).nll, base.nll)
    choice = Choice(head.rows(features.support), torch.zeros(HIDDEN), torch.ones(HIDDEN), 5, units=8)
    seen = choice_seen(choice, features, candidates_of(features, head, logits, 5), size=7)
    torch.testing.assert_close(seen.nll, base.nll)
    assert torch.equal(seen.picked, base.picked)
    logits_TV = head.logits(features.hidden)
    torch.testing.assert_close(base.nll, F.cross_entropy(logits_TV, features.token, reduction="none"))


def test_network_is_its_formula():
    """`z + W_S w (c + U gelu(V n(h) + o))`, token by token."""
    head, features = head_of(), features_of(head_of())
    network = HiddenNetwork(head, 8, tuple(SUPPORT))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    network.calibrate(features.hidden)
    logits_TV = head.logits(features.hidden)
    for token in range(0, len(features), 9):
        hidden_D = (features.hidden[token] - network.hidden_mean) / network.hidden_scale
        units_H = F.gelu(network.reads[0] @ hidden_D + network.offsets)
        move_D = network.directions[0] + network.writes[0].T @ units_H
        weight = torch.sigmoid(network.entropy_gate(features.entropy[token, None]))
        moved_V = logits_TV[token].clone()
        moved_V[SUPPORT] += (weight * (head.rows(features.support) @ move_D)).detach()
        wanted = F.cross_entropy(moved_V, features.token[token])
        seen = seen_by(network, features, head, BaseLogits(features, head, 0))
        torch.testing.assert_close(seen.nll[token], wanted, rtol=1e-5, atol=1e-5)


def test_kept_logits_of_a_part_are_those_of_its_tokens():
    head, features = head_of(), features_of(head_of())
    part = features.at(slice(11, 40))
    for budget in (2**20, 0):
        logits = BaseLogits(features, head, budget).between(11, 40)
        torch.testing.assert_close(
            seen_by(None, part, head, logits).nll,
            seen_by(None, features, head, BaseLogits(features, head, 0)).nll[11:40],
        )
