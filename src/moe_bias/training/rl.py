"""Reinforcement learning with verifiable rewards: sample, verify, update many times without the backbone.

The objective, where no other is given, is GRPO with DAPO's clipping (`objectives`), over the high-entropy tokens of
a step's samples (arXiv 2506.01939, 2503.14476). Departures from both papers:

- the policy that samples is the policy that is trained, to the bit of its weights: hidden states,
  rest scalars and log-probabilities are those of the sampling, so nothing is computed again and no
  reference model exists;
- the threshold is taken over all tokens of a step's kept groups, once, and not in every minibatch;
- a step's problems are drawn by seed and step, not in the order of epochs over the data;
- KL is exact. `kl_bound` is a hard bound on KL to the base, `step_kl` on KL to the policy that sampled, each a
  mean over the step's selected tokens: an update that exceeds one is halved until it does not, or undone;
- a step in which few problems teach is a small one: with `shrink_steps` its rates are multiplied by the share of the
  sampled groups whose rewards differ. The loss is a mean over the tokens of those groups, so that otherwise a step
  of one group would be as large as one of all.

A step is: collect, then `epochs` passes over the selected tokens in minibatches; what follows it is in `loop`. All
draws follow from seed and step, so that a run which was killed does the interrupted step again, with the same samples.

Shapes: T tokens, M support.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import RLConfig
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import Meter
from moe_bias.tasks.verdict import OUTCOMES
from moe_bias.training.checkpoint import Standing
from moe_bias.training.collect import Collected, Collects
from moe_bias.training.loop import NOTHING_ELSE, Loop
from moe_bias.training.loop import Watching as Watching
from moe_bias.training.metrics import HELD_OUT_ACCURACY, HELD_OUT_TOKENS, Metrics, beside
from moe_bias.training.objective_trial import check_objective
from moe_bias.training.objectives import DAPO, Objective, Sampled
from moe_bias.training.optimisation import Optimisation
from moe_bias.training.step_tokens import Lesson, StepTokens, Take, Tokens, TokensHere

HALVINGS = 8
"""How often an update that exceeds a bound on KL is halved before it is undone."""


@dataclass(frozen=True)
class PolicyPosition(Standing):
    """Where a run stands: steps in a row without a group to learn from, and the last and the best accuracy.

    `threshold`: the entropy in nats from which tokens were last selected.
    """

    equal: int = 0
    accuracy: float | None = None
    best_accuracy: float | None = None
    best_step: int = 0
    sampled_tokens: int = 0
    update_seconds: float = 0.0
    seconds: float = 0.0
    threshold: float | None = None


class PolicyTrainer(Loop[PolicyPosition]):
    """One run of reinforcement learning. The layer is trained in place."""

    measure = HELD_OUT_ACCURACY

    def __init__(
        self,
        layer: MoEBiasLayer,
        head: Head,
        collector: Collects,
        settings: RLConfig,
        watching: Watching = NOTHING_ELSE,
        objective: Objective | None = None,
    ) -> None:
        """`objective` is what each update minimises (None: `DAPO` with the settings' terms).

        Raises UserError on one that cannot be used.
        """
        layer = layer.to(head.device)
        optimisation = Optimisation(layer, settings, settings.steps)
        super().__init__(layer, optimisation, watching, PolicyPosition(), settings.steps)
        self._collector = collector
        self._settings = settings
        self._update = Update(layer, head, settings, optimisation, objective)

    def run(self) -> PolicyPosition:
        """Trains to the end.

        Raises UserError where rewards have been equal for too many steps or a loss is not finite;
        KeyboardInterrupt on Ctrl-C between two steps, after a checkpoint where there are any.
        """
        self._loop("reinforcement learning", self._steps, "steps", self._position.step)
        return self._position

    def _step(self, bar: Meter) -> Metrics:
        step, started = self._position.step, time.perf_counter()
        collected = self._collector.collect(self._layer, step, self._position.threshold)
        updating = time.perf_counter()
        update = self._learn(collected, step)
        ended = time.perf_counter()
        metrics = _metrics(collected, update)
        metrics |= {"seconds": ended - started, "updating_seconds": ended - updating}
        self._position = replace(
            self._position,
            step=step + 1,
            equal=0 if collected.selected else self._position.equal + 1,
            sampled_tokens=self._position.sampled_tokens + sum(one.tokens for one in collected.judged),
            update_seconds=self._position.update_seconds + ended - updating,
            seconds=self._position.seconds + ended - started,
            threshold=collected.threshold if math.isfinite(collected.threshold) else self._position.threshold,
        )
        self._collected = collected
        self._say(bar, metrics)
        self._show(collected, bar)
        return metrics

    def _learn(self, collected: Collected, step: int) -> Metrics:
        share = collected.taught if self._settings.shrink_steps else 1.0
        if collected.elsewhere is not None:
            return self._update.over(collected.elsewhere, step, share)
        if collected.batch is None:
            return {}
        assert collected.sampled is not None
        return self._update.learn(collected.batch, collected.sampled, step, share)

    def _note(self, values: Mapping[str, float], bar: Meter) -> None:
        value = values[self.measure]
        position = replace(self._position, accuracy=value)
        if position.best_accuracy is None or value > position.best_accuracy:
            position = replace(position, best_accuracy=value, best_step=position.step)
        self._position = position
        length = f", {values[HELD_OUT_TOKENS]:.0f} tokens an answer" if HELD_OUT_TOKENS in values else ""
        bar.say(f"step {position.step}: {value:.1%} of the held-out problems right{length}")

    def _end(self, metrics: Metrics, bar: Meter) -> None:
        bar.advance(1)
        self._refuse_equal(self._collected)

    def _say(self, bar: Meter, metrics: Metrics) -> None:
        kl = f", KL {metrics['kl']:.3f}" if "kl" in metrics else ", nothing to learn from"
        bad_golds = f"{metrics['bad_gold']:.0%} with a bad gold, " if metrics["bad_gold"] else ""
        bar.say(
            f"step {self._position.step}: reward {metrics['reward']:.3f}, {metrics['correct']:.0%} right, {bad_golds}"
            f"{metrics['tokens_per_answer']:.0f} tokens, entropy {metrics['entropy']:.2f}{kl}"
        )

    def _show(self, collected: Collected, bar: Meter) -> None:
        """Keeps the samples where that is due, and shows the first."""
        if self._watching.samples is None:
            return
        shown = self._watching.samples.write(self._position.step, [one.as_line() for one in collected.judged])
        if shown is not None:
            bar.say(f"  {shown['question']!r} -> {shown['completion']!r}: {shown['outcome']}, {shown['reward']:g}")

    def _refuse_equal(self, collected: Collected) -> None:
        if self._position.equal < self._settings.equal_steps:
            return
        right = collected.outcomes["correct"] / max(len(collected.judged), 1)
        cut = sum(not one.finished for one in collected.judged) / max(len(collected.judged), 1)
        unread = collected.outcomes["bad gold"] / max(len(collected.judged), 1)
        bad_golds = f", {unread:.0%} have a bad gold" if unread else ""
        raise UserError(
            f"in {self._position.equal} steps in a row no problem had samples of different rewards, so there is "
            f"nothing to learn from: {right:.0%} of the last samples are right, {cut:.0%} reached the token "
            f"limit{bad_golds}; start from an adapter trained on worked answers (`adapter`), take easier or harder "
            "problems, or raise `group` or `max_new_tokens`"
        )


class Update:
    """What a step does with its selected tokens: minibatches, epochs, the bound on KL."""

    def __init__(
        self,
        layer: MoEBiasLayer,
        head: Head,
        settings: RLConfig,
        optimisation: Optimisation,
        objective: Objective | None = None,
    ) -> None:
        self._layer = layer
        self._head = head
        self._settings = settings
        self._optimisation = optimisation
        self.objective = objective_of(settings, objective)
        self._columns = head.columns(layer.support_or_all().to(head.device))

    def learn(self, batch: Features, sampled: Sampled, step: int, share: float = 1.0) -> Metrics:
        """Updates the layer at this share of its rates; `batch` and `sampled` hold the selected tokens of step `step`.

        Raises UserError before an optimiser step whose loss or gradient is not finite.
        """
        own = (self._layer, self._head, self._settings, self.objective, self._columns)
        return self.over(TokensHere(Tokens(*own, batch, sampled), step), step, share)

    def over(self, tokens: StepTokens, step: int, share: float = 1.0) -> Metrics:
        """The same over tokens wherever they are, of this layer."""
        bounds, lessons = self._bounds(tokens), list[Lesson]()
        for take in tokens.takes():
            before = self._weights()
            lessons.append(self._step(take, step, share))
            self._hold(bounds, before)
        moved = {"step_kl": tokens.kl_from_sampler(), "rate_share": share}
        return self._metrics(lessons, tokens.kl()) | moved | tokens.metrics()

    def _bounds(self, tokens: StepTokens) -> list[Callable[[], bool]]:
        """What must hold after each update of a step. A KL to the base that begins above its bound may not grow."""
        bounds: list[Callable[[], bool]] = []
        if self._settings.kl_bound is not None:
            to_base = max(self._settings.kl_bound, tokens.kl())
            bounds.append(lambda: tokens.kl() <= to_base)
        if self._settings.step_kl is not None:
            to_sampler = self._settings.step_kl
            bounds.append(lambda: tokens.kl_from_sampler() <= to_sampler)
        return bounds

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._layer.state_dict().items()}

    def _step(self, take: Take, step: int, share: float) -> Lesson:
        """An update by a minibatch of the step's tokens."""
        self._optimisation.zero_grad()
        lesson = take()
        norm = self._optimisation.norms().total
        if not (math.isfinite(lesson.loss) and norm < float("inf")):
            expert_rate, router_rate = self._settings.rates_of(self._layer.config.experts)
            raise UserError(
                f"the loss of step {step + 1} became {lesson.loss} with a gradient of norm {norm}; lower "
                f"`expert_rate` ({expert_rate:g}) or `router_rate` ({router_rate:g})"
            )
        self._optimisation.step(step, share)
        return lesson

    @torch.no_grad()
    def _hold(self, bounds: Sequence[Callable[[], bool]], before: Mapping[str, Tensor]) -> None:
        """Halves the last update until all bounds hold; or undoes it."""
        for _ in range(HALVINGS):
            if all(holds() for holds in bounds):
                return
            for name, tensor in self._layer.state_dict().items():
                tensor.copy_((tensor + before[name]) / 2)
        self._layer.load_state_dict(before)

    def _metrics(self, lessons: Sequence[Lesson], kl: float) -> Metrics:
        first = lessons[0]
        own = {
            "load_balance": first.load_balance,
            "kl": kl,
            "sampler_gap": first.sampler_gap,
            "router_entropy": first.router_entropy,
            "used_experts": first.used_experts,
            "updates": float(len(lessons)),
        }
        means = {name: sum(one.metrics[name] for one in lessons) / len(lessons) for name in first.metrics}
        return {"loss": first.loss, **beside(own, means), **own}


def objective_of(settings: RLConfig, objective: Objective | None) -> Objective:
    """The objective given, or that of the settings. Raises UserError on one that cannot be used."""
    terms = {name: getattr(settings, name) for name in ("eps_low", "eps_high", "kl_weight", "entropy_weight")}
    if objective is None:
        return DAPO(**terms)
    for name, value in terms.items():
        if value != type(settings).model_fields[name].default:
            raise UserError(f"`{name}` = {value:g} is of the usual objective; give it to your own")
    check_objective(objective, with_samples=True)
    return objective


def _of_right(collected: Collected) -> Metrics:
    """How long right answers are, where there are any: wrong ones may grow shorter by themselves."""
    tokens = [one.tokens for one in collected.judged if one.verdict.is_correct]
    return {"tokens_per_right_answer": sum(tokens) / len(tokens)} if tokens else {}


def _metrics(collected: Collected, update: Metrics) -> Metrics:
    """What the samples of a step were like, and what the update was."""
    samples, outcomes = len(collected.judged), collected.outcomes
    shares = {name.replace(" ", "_"): outcomes[name] / samples for name in OUTCOMES}
    taught = {"threshold": collected.threshold} if collected.selected else {}
    own = {
        "reward": sum(collected.rewards) / samples,
        **shares,
        "cut": sum(not one.finished for one in collected.judged) / samples,
        "tokens_per_answer": sum(one.tokens for one in collected.judged) / samples,
        **_of_right(collected),
        "samples": float(samples),
        "entropy": collected.entropy,
        "tokens": float(collected.tokens),
        "selected": float(collected.selected),
        **taught,
        "sampling_seconds": collected.sampling_seconds,
        "judging_seconds": collected.judging_seconds,
        **collected.moved,
    }
    return own | update
