"""The objective against the same loss written out over the whole vocabulary, and its gradient against autograd's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.lessons import HEAD, edit, fresh_layer, rewarded
from helpers.models import randomise
from moe_bias.backbone import adapted_logits
from moe_bias.features.adapted import adapted_policy
from moe_bias.learning.lessons import Batch
from moe_bias.learning.objective import FromFeedback
from moe_bias.training.gradients import gradients, plain_loss
from moe_bias.training.objective_trial import check_objective
from moe_bias.training.objectives import Then

BETA, WEIGHT = 0.3, 0.7


def written_out(layer, batch, advantages, old_T):
    """The mean loss an answer, one answer at a time, on logits of the whole vocabulary."""
    features = batch.features
    base_TV = HEAD.logits(features.hidden.float()).double()
    moved_TV = adapted_logits(layer, HEAD.transform, features.hidden, features.entropy, base_TV)
    of_token = [z_TV.log_softmax(-1).gather(-1, features.token[:, None])[:, 0] for z_TV in (base_TV, moved_TV)]
    total, answers = torch.zeros((), dtype=torch.float64), int(features.example.max()) + 1
    for number in range(batch.pairs):
        better, other = features.example == 2 * number, features.example == 2 * number + 1
        first = features.position[other].min()
        gains = [(of_token[1] - of_token[0])[answer & (features.position >= first)].sum() for answer in (better, other)]
        total = total - of_token[1][better].mean() - WEIGHT * F.logsigmoid(BETA * (gains[0] - gains[1]))
    for number, advantage in enumerate(advantages):
        forks = (features.example == 2 * batch.pairs + number) & batch.counts
        ratio_T = (of_token[1] - old_T)[forks].exp()
        total = total - torch.minimum(ratio_T * advantage, ratio_T.clamp(0.8, 1.28) * advantage).mean()
    return total / answers


@pytest.mark.parametrize(
    "lessons",
    [
        [edit(0)],
        [rewarded(1.0)],
        [edit(0), edit(1, length=11)],
        [rewarded(-1.0, 3, length=9), edit(2), rewarded(0.5, 4)],
    ],
    ids=["edit", "reward", "edits", "mixed"],
)
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(lessons):
    layer = fresh_layer()
    randomise(layer, scale=0.2)
    layer = layer.double()
    batch = Batch.of(lessons, 0.5)
    batch = replace(batch, features=replace(batch.features, hidden=batch.features.hidden.double()))
    advantage_R = batch.reward - 0.25
    old_T = adapted_policy(layer, batch.features, columns_of(batch), HEAD.transform).log_prob.detach() - 0.1
    objective = FromFeedback(batch.pairs, advantage_R, batch.counts, old_T, BETA, WEIGHT)
    expected = written_out(layer, batch, advantage_R.tolist(), old_T)
    wanted = torch.autograd.grad(expected, list(layer.parameters()), materialize_grads=True)
    layer.zero_grad()
    logits_TM = columns_of(batch)
    adapted = adapted_policy(layer, batch.features, logits_TM, HEAD.transform)
    plain = plain_loss(objective, adapted, Then(batch.features), 0.0)
    torch.testing.assert_close(plain.total.double(), expected, rtol=1e-5, atol=1e-6)
    layer.config = layer.config.model_copy(update={"load_balance_weight": 0.0})
    found = gradients(layer, batch.features, lambda rows: logits_TM[rows].clone(), HEAD.transform, objective)
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), gradient in zip(layer.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def columns_of(batch):
    return HEAD.columns(batch.features.support)(batch.features.hidden.float()).double()


def test_it_is_an_objective_of_the_library():
    nothing = torch.zeros(4, dtype=torch.bool)
    check_objective(FromFeedback(1, torch.zeros(0), ~nothing, torch.zeros(4), 0.1, 1.0), with_samples=False)
