"""A probe on the last hidden state as a layer: what logistic regression says of the labels, the model itself says.

Regression gives the labels' scores `B n(h) + b`, n(h) the standardised hidden state. A single linear expert of rank K
on the labels' K tokens moves their logits `z = s (W h + o)` by `W (c + U V n(h))`, and

    V = B - s W diag(scale)      U = W^+      c = W^+ (b + shift - s (W mean + o))

make the two the same, up to one shift for all labels: the layer's probabilities of the labels are the probe's. The
shift raises the labels together, until they have `MASS` of the probability on all but a few of the texts that were
learnt from, so that the model answers with one of them. W^+ is the pseudo-inverse of the labels' rows W (K, D) of the
output embedding, s the scale of its logits, o its own bias.

Shapes: N texts, D hidden, K labels.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import LayerConfig
from moe_bias.experiments.label_arms import LABELS, Chosen, Labels, Texts, chosen_penalty, regression
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError

MASS, TEXTS = 0.99, 0.95
"""The labels have so much of the probability together, on so large a share of the texts."""


def refuse_without_probe(head: Head) -> None:
    """Raises UserError where logits are no linear function of the hidden state, so that no expert can cancel them."""
    if head.transform.cap is not None:
        raise UserError(
            "the model bounds its logits by a soft-cap, so that no linear expert takes the probe's place; leave "
            "'probe' out of `arms`"
        )


def probe(labels: Labels, train: Texts, test: Texts, folds: int) -> Chosen:
    """Logistic regression as `logistic` has it, and the layer that answers as it does."""
    started = time.perf_counter()
    penalty = chosen_penalty(train, folds)
    searched = time.perf_counter()
    layer = as_layer(labels, regression(train, penalty), train)
    seconds = time.perf_counter() - searched
    parameters = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
    log_prob_NK = labels.layer_log_probs(layer, test, LABELS)
    return Chosen(log_prob_NK, seconds, searched - started, parameters, {"C": penalty}, layer)


@torch.no_grad()
def as_layer(labels: Labels, fitted: Any, train: Texts) -> MoEBiasLayer:
    """The layer of a fitted pipeline of scikit-learn: a StandardScaler and a LogisticRegression."""
    head, features = labels.head, train.on[LABELS]
    scaler, regressed = fitted[0], fitted[-1]
    weight_KD, offset_K = _of_all_labels(regressed.coef_, regressed.intercept_)
    mean_D, scale_D = (torch.from_numpy(part).double() for part in (scaler.mean_, scaler.scale_))
    rows_KD = head.rows(labels.token.to(head.device)).double().cpu()
    own_K = head.columns(labels.token.to(head.device))(torch.zeros(1, head.hidden_size, device=head.device))
    inverse_DK = torch.linalg.pinv(rows_KD)
    raw_KD = head.transform.scale * rows_KD
    moved_K = offset_K + _shift(train, weight_KD, offset_K, mean_D, scale_D) - raw_KD @ mean_D - own_K[0].double().cpu()

    support = tuple(features.support.tolist())
    config = LayerConfig(
        experts="linear",
        num_experts=1,
        top_k=1,
        expert_rank=len(rows_KD),
        support=support,
        entropy_gate=False,
        load_balance_weight=0.0,
    )
    layer = MoEBiasLayer(config, head.hidden_size, head.vocab_size, head.rows)
    assert layer.reads is not None
    assert layer.writes is not None
    assert layer.directions is not None
    layer.hidden_mean.copy_(mean_D)
    layer.hidden_scale.copy_(scale_D)
    layer.reads[0].copy_(weight_KD - raw_KD * scale_D)
    layer.writes[0].copy_(inverse_DK.T)
    layer.directions[0].copy_(inverse_DK @ moved_K)
    return layer.to(head.device)


def _of_all_labels(weight: Any, offset: Any) -> tuple[Tensor, Tensor]:
    """Weights (K, D) and offsets (K,); of two labels scikit-learn has those of the second over the first alone."""
    weight_KD, offset_K = torch.from_numpy(weight).double(), torch.from_numpy(offset).double()
    if len(weight_KD) > 1:
        return weight_KD, offset_K
    return torch.cat([-weight_KD / 2, weight_KD / 2]), torch.cat([-offset_K / 2, offset_K / 2])


def _shift(train: Texts, weight_KD: Tensor, offset_K: Tensor, mean_D: Tensor, scale_D: Tensor) -> float:
    """What all labels are raised by."""
    scores_NK = (train.hidden.double() - mean_D) / scale_D @ weight_KD.T + offset_K
    others_N = train.on[LABELS].rest.log_sum_exp.double().cpu()
    return float((others_N - scores_NK.logsumexp(-1)).quantile(TEXTS)) + math.log(MASS / (1 - MASS))
