"""Ways to choose among labels by the token that follows a prompt, all from the same hidden states.

A prompt ends where its label is to follow; h is the hidden state there, computed once, z the frozen model's logits, and
a way gives probabilities of the K labels:

    zero-shot    softmax of z on the labels' tokens
    contextual   softmax(W p + b) of those p, W = diag(p_cf)^-1 and b = 0, with p_cf the mean of p over inputs without
                 content (Zhao et al., arXiv 2102.09690)
    divided      p / p_cf, made to sum to 1: it chooses as `contextual` does, and keeps p where p_cf is uniform
    static       a logit bias for each label: one expert, no gate
    logistic     logistic regression on h, each dimension standardised (scikit-learn), with a penalty on the weights
    probe        the same as a layer, in `label_probe`
    moe-bias     a layer of the default kind, trained on the labels' tokens as `train sft` does
    lora         LoRA on the backbone, in `label_lora`

What a way has to choose it chooses by the NLL of the labels in cross-validation over its labelled texts alone, the same
folds for all: `static` among two learning rates, `moe-bias` among two of them and three things to be trained on (see
`ALONE`), both of them when to stop, and `logistic` among strengths of its penalty. Learning rates do not decay, so that
a run of the longest length shows all shorter ones. Where the frozen model gives the labels little probability, a layer
that is trained with the whole vocabulary first learns to answer with a label at all.

Shapes: N texts, D hidden, K labels, M support.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import SFTConfig
from moe_bias.extras import need
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.progress import without_bars
from moe_bias.support import RestScalars
from moe_bias.training.loop import Evaluate, Watching
from moe_bias.training.sft import fit, fresh_layer

MOST_STEPS = 100
EVERY = 5
"""Steps between the points at which a layer may stop, 0 among them."""
BATCH = 64
ALONE, LABELS, DEFAULT = "alone", "labels", "default"
"""What a layer is trained on: the labels' tokens alone, as if there were no others; these as a support, with the rest
of the vocabulary in the softmax; or the default support."""
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""C of scikit-learn: one over the weight of the penalty."""
_LOWEST = 1e-12
"""A probability of inputs without content is not divided by less."""
Choice = Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    """Hidden states at the ends of prompts, by what a layer is trained on, and the number of each text's label (N,)."""

    on: Mapping[str, Features]
    label: Tensor

    @classmethod
    def of(cls, narrow: Features, wide: Features, token_K: Tensor) -> Texts:
        """Of the same texts on the support of the labels' tokens and on the default one."""
        nothing = RestScalars(
            torch.full_like(narrow.rest.log_sum_exp, -math.inf), torch.zeros_like(narrow.rest.mean_logit)
        )
        label_N = (narrow.token[:, None] == token_K).int().argmax(-1)
        return cls({ALONE: replace(narrow, rest=nothing), LABELS: narrow, DEFAULT: wide}, label_N)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def hidden(self) -> Tensor:
        """(N, D) float32."""
        return at_least_float32(self.on[LABELS].hidden)

    def at(self, rows: Tensor) -> Texts:
        """Some of them."""
        return Texts({name: features.at(rows) for name, features in self.on.items()}, self.label[rows])


@dataclass(frozen=True)
class Labels:
    """The labels' tokens (K,) at a head."""

    head: Head
    token: Tensor

    def base_log_probs(self, texts: Texts) -> Tensor:
        """Of the frozen model, (N, K) float32, each row summing to 1 over the labels."""
        return self._logits(texts).log_softmax(-1)

    @torch.no_grad()
    def layer_log_probs(self, layer: MoEBiasLayer, texts: Texts, support: str) -> Tensor:
        """Under a layer that is trained on `support`, (N, K) float32."""
        features, logits_NK = texts.on[support], self._logits(texts)
        column_K = (features.support[:, None] == self.token).int().argmax(0)
        bias_NM = layer(features.hidden.to(layer.device), features.entropy.to(layer.device)).bias
        move_NK = layer.strength * bias_NM[:, column_K.to(bias_NM.device)].cpu()
        return (logits_NK + self.head.transform.reachable(logits_NK, move_NK)).log_softmax(-1)

    def _logits(self, texts: Texts) -> Tensor:
        hidden = texts.on[LABELS].hidden.to(self.head.device)
        return self.head.columns(self.token.to(self.head.device))(hidden).cpu()


@dataclass(frozen=True)
class Chosen:
    """What a way came to: log-probabilities (N, K) of the labels of the texts to measure on, and what it took.

    `seconds` are of the final training, `search_seconds` of choosing; `layer` is the trained one, where there is one.
    """

    log_prob: Tensor
    seconds: float = 0.0
    search_seconds: float = 0.0
    parameters: int = 0
    choice: Choice | None = None
    layer: MoEBiasLayer | None = None


def nll(log_prob_NK: Tensor, label_N: Tensor) -> Tensor:
    """Negative log-likelihood (N,) in nats of the labels."""
    return -log_prob_NK.gather(-1, label_N[:, None]).squeeze(-1)


def contextual(prob_NK: Tensor, free_K: Tensor) -> Tensor:
    """`softmax(W p + b)`, W = diag(p_cf)^-1 and b = 0, (N, K); `free_K` is p_cf (arXiv 2102.09690, section 4)."""
    return (prob_NK / free_K.clamp(min=_LOWEST)).softmax(-1)


def divided(prob_NK: Tensor, free_K: Tensor) -> Tensor:
    """`p / p_cf`, made to sum to 1, (N, K)."""
    ratio_NK = prob_NK / free_K.clamp(min=_LOWEST)
    return ratio_NK / ratio_NK.sum(-1, keepdim=True)


def zero_shot_arms(labels: Labels, test: Texts, free: Texts) -> dict[str, Chosen]:
    """The ways that learn nothing, by name; `free` are inputs without content."""
    log_prob_NK = labels.base_log_probs(test)
    free_K = labels.base_log_probs(free).exp().mean(0)
    calibrated = {
        "contextual": contextual(log_prob_NK.exp(), free_K),
        "divided": divided(log_prob_NK.exp(), free_K),
    }
    choice = {"without content": [round(float(share), 4) for share in free_K]}
    return {
        "zero-shot": Chosen(log_prob_NK),
        **{name: Chosen(prob.clamp(min=_LOWEST).log(), choice=choice) for name, prob in calibrated.items()},
    }


def drawn(label_N: Tensor, count: int, fewest: int, seed: int) -> Tensor:
    """Numbers (count,) of labelled texts, drawn with the seed, with at least `fewest` of each label among them.

    A larger count of the same seed holds the smaller one.
    """
    order_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(seed))
    place_N = _place_within(label_N[order_N])
    first_N = torch.cat([order_N[place_N < fewest], order_N[place_N >= fewest]])
    return first_N[:count]


def folds_of(label_N: Tensor, folds: int) -> Tensor:
    """The fold (N,) of each text: those of a label are dealt out in turn, so that every fold has its share of each."""
    dealt_N = label_N.argsort(stable=True)
    fold_N = torch.empty_like(label_N)
    fold_N[dealt_N] = torch.arange(len(label_N)) % folds
    return fold_N


def _place_within(label_N: Tensor) -> Tensor:
    """How many texts of the same label stand before each."""
    return torch.stack([(label_N == label).cumsum(0) * (label_N == label) for label in label_N.unique()]).sum(0) - 1


def logistic(train: Texts, test: Texts, folds: int) -> Chosen:
    """Logistic regression on the standardised hidden states."""
    started = time.perf_counter()
    penalty = chosen_penalty(train, folds)
    searched = time.perf_counter()
    log_prob_NK = _answered(regression(train, penalty), test)
    classes = log_prob_NK.shape[-1]
    return Chosen(
        log_prob_NK,
        time.perf_counter() - searched,
        searched - started,
        (classes if classes > 2 else 1) * (train.hidden.shape[-1] + 1),
        {"C": penalty},
    )


def chosen_penalty(train: Texts, folds: int) -> float:
    """C of the least NLL over the folds, each answered from the others."""
    need("sklearn", "the arms `logistic` and `probe`")
    fold_N = folds_of(train.label, folds)

    def loss(penalty: float) -> float:
        parts = _parts(train, fold_N)
        return float(
            torch.cat([nll(_answered(regression(rest, penalty), part), part.label) for rest, part in parts]).mean()
        )

    return min(PENALTIES, key=loss)


def regression(train: Texts, penalty: float) -> Any:
    """A fitted pipeline of scikit-learn: a StandardScaler and a LogisticRegression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty has no end in separable texts
        model.fit(train.hidden.double().numpy(), train.label.numpy())
    return model


def _answered(model: Any, texts: Texts) -> Tensor:
    return torch.from_numpy(model.predict_log_proba(texts.hidden.double().numpy())).float()


def _parts(train: Texts, fold_N: Tensor) -> Iterator[tuple[Texts, Texts]]:
    """For each fold the other texts, and its own."""
    for fold in fold_N.unique():
        is_in_N = fold_N == fold
        yield train.at((~is_in_N).nonzero()[:, 0]), train.at(is_in_N.nonzero()[:, 0])


@dataclass(frozen=True)
class LayerArm:
    """A kind of layer, and what is tried of it: what it is trained on, with a learning rate of the experts."""

    name: str
    layer: Mapping[str, Any]
    tried: Sequence[tuple[str, float]]


STATIC = LayerArm(
    "static",
    {"experts": "free", "num_experts": 1, "top_k": 1, "entropy_gate": False},
    ((ALONE, 2e-2), (ALONE, 1e-1)),
)
MOE_BIAS = LayerArm("moe-bias", {}, ((ALONE, 3e-5), (ALONE, 3e-4), (LABELS, 3e-5), (DEFAULT, 3e-5)))
"""A hundredth of the default rate, and a tenth: few texts are soon learnt by heart."""


def trained(arm: LayerArm, labels: Labels, train: Texts, test: Texts, folds: int, seed: int) -> Chosen:
    """A layer whose support, rate and number of steps are chosen by cross-validation."""
    started = time.perf_counter()
    fold_N = folds_of(train.label, folds)
    losses: dict[tuple[str, float, int], float] = {}
    for support, rate in arm.tried:
        curve = _curve(arm, labels, train, fold_N, support, rate, seed)
        losses.update({(support, rate, EVERY * number): loss for number, loss in enumerate(curve)})
    support, rate, steps = min(losses, key=lambda choice: losses[choice])
    searched = time.perf_counter()
    layer = _fitted(arm, labels, train, support, rate, seed, steps)
    seconds = time.perf_counter() - searched
    return Chosen(
        labels.layer_log_probs(layer, test, support),
        seconds,
        searched - started,
        layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
        {"trained on": support, "expert_rate": rate, "steps": steps},
        layer,
    )


def _curve(
    arm: LayerArm, labels: Labels, train: Texts, fold_N: Tensor, support: str, rate: float, seed: int
) -> list[float]:
    """Mean NLL over the folds after every so many steps, from 0 steps on."""
    losses = []
    for rest, part in _parts(train, fold_N):
        points: list[Tensor] = []

        def measure(layer: MoEBiasLayer, part: Texts = part, points: list[Tensor] = points) -> None:
            points.append(nll(labels.layer_log_probs(layer, part, support), part.label))

        _fitted(arm, labels, rest, support, rate, seed, MOST_STEPS, measure)
        losses.append(torch.stack(points[: MOST_STEPS // EVERY + 1]))
    return torch.cat(losses, dim=-1).mean(-1).tolist()


def _fitted(
    arm: LayerArm,
    labels: Labels,
    train: Texts,
    support: str,
    rate: float,
    seed: int,
    steps: int,
    measure: Evaluate | None = None,
) -> MoEBiasLayer:
    """A layer after so many steps, measured from 0 on; one of no steps is fresh, and changes nothing."""
    features = train.on[support]
    per_epoch = math.ceil(len(features) / BATCH)
    epochs = max(math.ceil(steps / per_epoch), 1)
    steady = {"decay": "none", "warmup": 0.0, "batch_tokens": BATCH, "epochs": epochs}
    config = SFTConfig(**arm.layer, **steady, expert_rate=rate, seed=seed)
    layer = fresh_layer(config, tuple(features.support.tolist()), labels.head)
    if steps == 0:
        return layer
    logits = BaseLogits(features, labels.head, config.logits_budget)
    watching = Watching(measure, EVERY, callbacks=[_After(steps)])
    with without_bars():
        fit(layer, features, labels.head, config, arm.name, watching, logits=logits)
    return layer


@dataclass(frozen=True)
class _After:
    """Ends a run after so many steps."""

    steps: int

    def on_step(self, step: int, metrics: Mapping[str, float], layer: MoEBiasLayer) -> bool:
        """Whether they are done."""
        return step >= self.steps


def as_lists(log_prob_NK: Tensor) -> list[list[float]]:
    """For a record."""
    return [[round(value, 6) for value in row] for row in np.asarray(log_prob_NK, dtype=np.float64).tolist()]
