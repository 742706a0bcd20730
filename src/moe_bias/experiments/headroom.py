"""How much of the held-out loss a layer at the output could remove, from stored features and before any training.

Probes are trained on the same tokens, each stopped where it is best on a tenth of the training examples, which it does
not see, and measured on the held-out ones:

    static      one bias for every token: a direction in the space of the output embedding, and free entries
    moe-bias    the layer, as the settings have it
    network     a two-layer network in place of its experts (see `probes`)
    choice      a two-layer network that chooses among the base's top tokens (see `probes`)

Of the last three the best on the examples that stopped them is the estimate of what a function of the last hidden state
reaches with so many tokens. It is a lower bound of the ceiling. What it leaves may be chance in the text, may need more
tokens, or may need the backbone: the features do not tell these apart.

The layer is trained on an eighth, a quarter and a half of the tokens too, on several parts of each size, and the curve
is drawn on (see `learning_curve`). Intervals of figures are over held-out examples, those of forecasts over curves.

Shapes: T tokens, M support.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import SFTConfig
from moe_bias.evaluation.statistics import Estimate, Floats, ratio_of_sums
from moe_bias.evaluation.strata import STRATA, by_stratum, counts_by_stratum
from moe_bias.experiments.learning_curve import Forecast, Point, forecast
from moe_bias.experiments.probes import (
    UNITS,
    Choice,
    ChoiceData,
    HiddenNetwork,
    Seen,
    candidates_of,
    choice_seen,
    fit_choice,
    in_chunks,
)
from moe_bias.features.adapted import TableMove
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource, Subset
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.support import fork_threshold, log_prob_from_adapted
from moe_bias.training.loop import Watching
from moe_bias.training.sft import fit, fresh_layer

BASE, STATIC, LAYER, NETWORK, CHOICE = "base", "static", "moe-bias", "network", "choice"
CEILING = (LAYER, NETWORK, CHOICE)
"""Of which the best one stands for what a function of the last hidden state reaches."""
TRAIN_TOKENS = 50_000
"""Taken where the settings name no number."""
LEAST_TOKENS = 800
"""An eighth of them is a hundred."""
STOP_SHARE = 0.1
"""Of the training examples, to stop training by."""
PATIENCE = 2
"""Evaluations without a better one, where the settings say nothing."""
PROBE_EPOCHS = 3
PROBE_RATE = 1 / 3
"""Of the layer's rates: the rank is many times as high."""
PROBE_BATCH, PROBE_STEPS = 1024, 32
"""Tokens in a step of the networks, at most, and steps that an epoch has, about, where there are few tokens."""
SHARES = (8, 4, 2)
"""Parts of the tokens that the curve has, as 1 over these."""
DRAWS = 2
"""Trainings of each, on different tokens."""


@dataclass(frozen=True)
class Options:
    """`top` tokens to choose among; after `time_limit` seconds no probe is begun."""

    top: int = 20
    time_limit: float = 300.0


@dataclass(frozen=True)
class Probe:
    """What a probe was measured to do. By stratum of entropy: NLL in nats per token, its paired change to the base.

    `picked` is the share of high-entropy tokens for which the answer's token is the likeliest one; `stop_nll` is the
    NLL on the examples that it was stopped by; `tokens` it was trained on, of which nothing is counted twice.
    """

    name: str
    parameters: int
    tokens: int
    seconds: float
    nll: dict[str, Estimate]
    change: dict[str, Estimate]
    picked: Estimate
    stop_nll: float


@dataclass(frozen=True)
class Coverage:
    """Shares of the held-out targets that lie in the support, and among the base's top tokens of it.

    The latter of all and of high-entropy tokens. `nll_outside` is what targets outside the top tokens contribute to the
    base's NLL in nats per token, and `high_share` what high-entropy tokens do, as a share of it.
    """

    support: float
    top: float
    top_at_forks: float
    nll_outside: float
    high_share: float


@dataclass(frozen=True)
class Findings:
    """All that was measured. `best` is None where no probe of `CEILING` was run; `left_out` are for the time limit."""

    probes: list[Probe]
    coverage: Coverage
    curve: list[Point]
    forecast: Forecast
    best: str | None
    train_tokens: int
    stop_tokens: int
    held_out_tokens: int
    examples: int
    available_tokens: int
    top: int
    left_out: list[str] = field(default_factory=list)

    def probe(self, name: str) -> Probe | None:
        """The probe of this name, where it was run."""
        return next((probe for probe in self.probes if probe.name == name), None)


@dataclass(frozen=True)
class Ground:
    """What all probes share: the head, settings, tokens to train on, to stop by and to measure on, with base logits.

    `by_unit` turns sums over held-out examples into sums over what is held out whole.
    """

    head: Head
    config: SFTConfig
    train: FeatureSource
    stop: Features
    held_out: Features
    logits: BaseLogits
    stop_logits: BaseLogits
    held_out_logits: BaseLogits
    by_unit: Callable[[Floats], Floats]

    @property
    def support(self) -> tuple[int, ...] | None:
        """As a layer takes it."""
        ids = self.held_out.support.tolist()
        return None if len(ids) == self.head.vocab_size else tuple(ids)


def refuse_too_few(tokens: int, wanted: int | None) -> None:
    """Raises UserError where there are too few training tokens, or too few are asked for."""
    if wanted is not None and wanted < LEAST_TOKENS:
        raise UserError(f"`train_tokens` is {wanted:,}; at least {LEAST_TOKENS:,} are needed to draw a curve through")
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"there are {tokens:,} tokens to train on; at least {LEAST_TOKENS:,} are needed to draw a curve through, "
            "with those that are held out besides"
        )


def prepared_ground(
    train: FeatureSource, held_out: Features, head: Head, config: SFTConfig, by_unit: Callable[[Floats], Floats]
) -> Ground:
    """The tokens of training examples drawn with the seed, a tenth of them to stop by, and their base logits.

    Raises UserError on too few tokens or examples.
    """
    refuse_too_few(len(train), config.train_tokens)
    if not len(held_out):
        raise UserError("`data` has no held-out examples to measure on; extract it with `held_out` above 0")
    config = config.model_copy(update={"reach": "support"})  # the features have no other tokens' logits
    number, stop_T = _drawn(train.example, config.train_tokens or TRAIN_TOKENS, config.seed)
    stop = Subset(train, number[stop_T]).at(slice(None))
    rest = Subset(train, number[~stop_T])
    budget = int(config.logits_budget)
    logits = BaseLogits(rest, head, budget)
    held_out_logits = BaseLogits(held_out, head, budget - logits.nbytes)
    stop_logits = BaseLogits(stop, head, budget - logits.nbytes - held_out_logits.nbytes)
    return Ground(head, config, rest, stop, held_out, logits, stop_logits, held_out_logits, by_unit)


def measure(ground: Ground, options: Options, available: int) -> Findings:
    """Runs the probes and the curve; `available` are the training tokens that there are, of which some are used.

    Raises UserError where a loss is not finite.
    """
    started = time.perf_counter()
    base = _seen(None, ground)
    probes, left_out, points = [_measured(BASE, ground, base, base, 0, 0.0, _mean(_stop_nll(None, ground)))], [], []

    def probed(name: str, run: Callable[[], tuple[Seen, int, float]]) -> None:
        begun = time.perf_counter()
        seen, parameters, stop_nll = run()
        probes.append(_measured(name, ground, seen, base, parameters, time.perf_counter() - begun, stop_nll))
        if name == LAYER:
            points.append(Point(len(ground.train), _mean(seen.nll)))

    # The choice comes last: it takes long, and seldom is the best.
    for name, work in {
        STATIC: partial(probed, STATIC, lambda: _run_layer(ground, _static_config(ground.config), STATIC)),
        LAYER: partial(probed, LAYER, lambda: _run_layer(ground, ground.config, LAYER)),
        NETWORK: partial(probed, NETWORK, lambda: _run_network(ground)),
        **{
            f"1/{parts} of the tokens, part {draw + 1}": partial(_add_point, points, ground, parts, draw)
            for parts in SHARES
            for draw in range(DRAWS)
        },
        CHOICE: partial(probed, CHOICE, lambda: _run_choice(ground, options.top)),
    }.items():
        if time.perf_counter() - started > options.time_limit:
            left_out.append(name)
        else:
            work()
    points.sort(key=lambda point: point.tokens)
    return Findings(
        probes,
        _coverage(ground, base, options.top),
        points,
        forecast(points, probes[0].nll["all"].value, seed=ground.config.seed),
        _best(probes),
        len(ground.train),
        len(ground.stop),
        len(ground.held_out),
        len(ground.by_unit(counts_by_stratum(ground.held_out)["all"])),
        available,
        options.top,
        left_out,
    )


def _drawn(example_T: Tensor, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens of whole examples in random order, about so many, and which of them (T,) stop training."""
    ids, place_T, counts = example_T.unique(return_inverse=True, return_counts=True)
    order = random.Random(seed).sample(range(len(ids)), len(ids))
    rank = torch.empty(len(ids), dtype=torch.int64)
    rank[torch.tensor(order)] = torch.arange(len(ids))
    used = int((counts[torch.tensor(order)].cumsum(0) <= tokens).sum())
    if used < 2:
        raise UserError(
            f"{tokens:,} tokens hold {used} whole examples; at least 2 are needed, one to train on and one to stop by: "
            "raise `train_tokens`"
        )
    stopping = min(max(round(STOP_SHARE * used), 1), used - 1)
    number = rank[place_T].argsort(stable=True)
    number = number[rank[place_T][number] < used]
    return number, rank[place_T][number] < stopping


def _static_config(config: SFTConfig) -> SFTConfig:
    """One bias for every token: a direction and free entries, at the rates of their kinds."""
    own = {"experts": "directions", "free_entries": True, "num_experts": 1, "top_k": 1, "entropy_gate": False}
    return config.model_copy(update={**own, "expert_rate": None, "router_rate": None, "expert_dropout": 0.0})


def _run_layer(ground: Ground, config: SFTConfig, name: str) -> tuple[Seen, int, float]:
    """The held-out tokens under a layer that is trained on all of them, its parameters, and the loss it stopped at."""
    layer = fresh_layer(config, ground.support, ground.head)
    return _trained(layer, ground, config, name)


def _run_network(ground: Ground) -> tuple[Seen, int, float]:
    torch.manual_seed(ground.config.seed)
    return _trained(HiddenNetwork(ground.head, UNITS, ground.support), ground, _network_config(ground), NETWORK)


def _network_config(ground: Ground) -> SFTConfig:
    """Few passes in large batches: that reads the table of the units, which is wide, less often."""
    experts, router = ground.config.rates_of("linear")
    return SFTConfig(
        seed=ground.config.seed,
        epochs=PROBE_EPOCHS,
        batch_tokens=min(max(len(ground.train) // PROBE_STEPS, 1), PROBE_BATCH),
        expert_rate=PROBE_RATE * experts,
        router_rate=PROBE_RATE * router,
    )


def _trained(layer: MoEBiasLayer, ground: Ground, config: SFTConfig, name: str) -> tuple[Seen, int, float]:
    stop_nll = _fitted(layer, ground.train, ground, config, ground.logits, name)
    return _seen(layer, ground), sum(parameter.numel() for parameter in layer.parameters()), stop_nll


def _fitted(
    layer: MoEBiasLayer, train: FeatureSource, ground: Ground, config: SFTConfig, logits: BaseLogits, name: str
) -> float:
    watching = Watching(
        lambda now: _mean(_stop_nll(now, ground)), config.evaluate_every, patience=config.patience or PATIENCE
    )
    config = config.model_copy(update={"train_tokens": None})
    report = fit(layer, train, ground.head, config, name, watching, logits=logits)
    assert report.held_out_nll is not None, "patience measures"
    return report.held_out_nll


def _run_choice(ground: Ground, top: int) -> tuple[Seen, int, float]:
    data = ChoiceData(
        ground.train,
        candidates_of(ground.train, ground.head, ground.logits, top),
        ground.stop,
        candidates_of(ground.stop, ground.head, ground.stop_logits, top),
    )
    device = ground.head.device
    torch.manual_seed(ground.config.seed)
    hidden_TD = ground.stop.hidden.to(device, torch.float32)
    scale_D = hidden_TD.std(0).clamp(min=1e-6)
    rows_MD = ground.head.rows(ground.held_out.support.to(device))
    choice = Choice(rows_MD, hidden_TD.mean(0), scale_D, data.train_candidates.column.shape[1]).to(device)
    stop_nll, _ = fit_choice(choice, data, _network_config(ground), CHOICE)
    candidates = candidates_of(ground.held_out, ground.head, ground.held_out_logits, top)
    seen = choice_seen(choice, ground.held_out, candidates)
    return seen, sum(parameter.numel() for parameter in choice.parameters()), stop_nll


def _add_point(points: list[Point], ground: Ground, parts: int, draw: int) -> None:
    """The layer on one part of the tokens; draws are far apart, so that those of a size share none."""
    size = len(ground.train) // parts
    start = draw * (len(ground.train) // DRAWS)
    part = Subset(ground.train, torch.arange(start, start + size))
    config = ground.config.model_copy(update={"seed": ground.config.seed + draw})
    layer = fresh_layer(config, ground.support, ground.head)
    _fitted(layer, part, ground, config, ground.logits.between(start, start + size), f"1/{parts} of it, {draw + 1}")
    points.append(Point(size, _mean(_seen(layer, ground).nll)))


def _seen(layer: MoEBiasLayer | None, ground: Ground) -> Seen:
    return seen_by(layer, ground.held_out, ground.head, ground.held_out_logits)


def _stop_nll(layer: MoEBiasLayer | None, ground: Ground) -> Tensor:
    return seen_by(layer, ground.stop, ground.head, ground.stop_logits).nll


@torch.no_grad()
def seen_by(layer: MoEBiasLayer | None, source: FeatureSource, head: Head, logits: BaseLogits) -> Seen:
    """What a layer, or the base for None, makes of all tokens of a source with these base logits."""
    parts = []
    move = None if layer is None else TableMove(layer, layer.table(), head.transform)
    for batch, logits_TM in in_chunks(source, head, logits):
        if layer is not None and move is not None:
            logits_TM = move.adapted(layer.mix(batch.hidden, batch.entropy).coefficients, logits_TM)
        nll_T = -log_prob_from_adapted(batch.logit, batch.column, logits_TM, batch.rest)
        parts.append((nll_T.cpu(), (logits_TM.argmax(-1) == batch.column).cpu()))
    nll, picked = (torch.cat(column) for column in zip(*parts, strict=True))
    return Seen(nll, picked)


def _measured(
    name: str, ground: Ground, seen: Seen, base: Seen, parameters: int, seconds: float, stop_nll: float
) -> Probe:
    held_out = ground.held_out
    counts = counts_by_stratum(held_out)
    nll, change = by_stratum(seen.nll, held_out), by_stratum(seen.nll - base.nll, held_out)
    picked = by_stratum(seen.picked.float(), held_out)
    return Probe(
        name,
        parameters,
        0 if name == BASE else len(ground.train),
        seconds,
        {stratum: _per_token(ground, nll[stratum], counts[stratum]) for stratum in STRATA},
        {stratum: _per_token(ground, change[stratum], counts[stratum]) for stratum in STRATA},
        _per_token(ground, picked["high"], counts["high"]),
        stop_nll,
    )


def _per_token(ground: Ground, sums: Floats, counts: Floats) -> Estimate:
    """Resampled are the units with tokens of the stratum, so that no draw is without any; one alone has no interval."""
    top, bottom = ground.by_unit(sums), ground.by_unit(counts)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(bottom) < 2:
        value = float(top.sum() / max(bottom.sum(), 1))
        return Estimate(value, value, value)
    return ratio_of_sums(top, bottom)


def _coverage(ground: Ground, base: Seen, top: int) -> Coverage:
    held_out = ground.held_out
    target = candidates_of(held_out, ground.head, ground.held_out_logits, top).target.cpu()
    high_T = held_out.entropy >= fork_threshold(held_out.entropy)
    among_T = target >= 0
    total = float(base.nll.double().sum())
    return Coverage(
        support=_mean((held_out.column >= 0).float()),
        top=_mean(among_T.float()),
        top_at_forks=_mean(among_T[high_T].float()),
        nll_outside=float(base.nll[~among_T].double().sum()) / len(target),
        high_share=float(base.nll[high_T].double().sum()) / total if total else 0.0,
    )


def _best(probes: Sequence[Probe]) -> str | None:
    """By the examples that stop training: chosen by the held-out ones it would be too good."""
    run = [probe for probe in probes if probe.name in CEILING]
    return min(run, key=lambda probe: probe.stop_nll).name if run else None


def _mean(values_T: Tensor) -> float:
    return float(values_T.double().mean())
