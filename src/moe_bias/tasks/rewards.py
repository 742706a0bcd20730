"""From verdicts to the rewards that a trainer uses.

The parts are the verdict's reward, whether the completion has a form (a regular expression), and a
function of the user's; each is from 0 to 1, and so is their weighted mean

    R = (w_verdict r_verdict + w_format r_format + w_user r_user) / (w_verdict + w_format + w_user).

Length, for completions of n tokens, end token included, under a limit of L. What a right answer is worth falls
by lambda with every 100 tokens, and beyond a budget of B tokens to nothing:

    r_verdict  is multiplied by  worth(n) = max(0, 1 - lambda n / 100) [n <= B],

r_user in its place where the verdict has no weight, and the form never. So only what an answer has earned is
shaped: a wrong one is worth 0 at any length, and no length makes a right one worth less than it. DAPO's overlong
shaping (2503.14476) is added for all completions, right or wrong, with a cache of C tokens before the limit:

    R_length = -clip((n - (L - C)) / C, 0, 1).

So a shaped reward is from -1 to 1, below 0 through this alone. It is not clipped at 0: a wrong
answer that is too long must stay worse than a wrong one that is not.

A user's function that raises makes that sample's shaped reward 0, and is counted in `RewardFailures`;
one that gives no number from 0 to 1 stops the run.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from moe_bias.mistakes import UserError, shown
from moe_bias.plugins import Kind, label, resolve, told
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict

UserReward = Callable[[str, str, str], float]
"""A function of prompt, completion and gold answer."""
REWARDS = Kind("reward")
"""No reward is built in: those of packages are entry points of `moe_bias.rewards`."""


@dataclass(frozen=True)
class RewardRules:
    """The weights of the parts, what `user` and `form` (a regular expression) are; of length the cache C, lambda and B.

    `user` is a function, `module:function`, or the name of an installed package's. `form` may match anywhere in the
    completion, `.` matches a line's end too; anchor it with `^` and `$`. `length_penalty` is lambda, per 100 tokens;
    `token_budget` is B in tokens, 0 for none.
    """

    verdict_weight: float = 1.0
    form: str = ""
    form_weight: float = 0.0
    user: str | UserReward = ""
    user_weight: float = 0.0
    overlong_cache: int = 0
    length_penalty: float = 0.0
    token_budget: int = 0

    def __post_init__(self) -> None:
        for name in ("verdict_weight", "form_weight", "user_weight"):
            weight = getattr(self, name)
            if not 0 <= weight < math.inf:
                raise UserError(f"{name} = {weight} is not a weight; give a finite number from 0 up")
        if self.verdict_weight + self.form_weight + self.user_weight == 0:
            raise UserError("verdict_weight, form_weight and user_weight are all 0; give one of them a weight")
        for name in ("overlong_cache", "length_penalty", "token_budget"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"{name} = {value} is not a number from 0 up; give 0 for no shaping")
        for name in ("length_penalty", "token_budget"):
            if getattr(self, name) and not self.verdict_weight + self.user_weight:
                raise UserError(
                    f"`{name}` {getattr(self, name):g} shapes what a right answer is worth, and nothing says what is "
                    "right: give `verdict_weight` or `reward_weight`"
                )
        _check_pair("form", self.form, self.form_weight)
        _check_pair("user", self.user, self.user_weight)

    @property
    def earned_share(self) -> float:
        """What of a reward, from 0 to 1, the part that length shapes makes up."""
        earned = self.verdict_weight or self.user_weight
        return earned / (self.verdict_weight + self.form_weight + self.user_weight)

    def worth(self, length: int) -> float:
        """What an answer of so many tokens keeps, from 0 to 1, of what it earned."""
        if self.token_budget and length > self.token_budget:
            return 0.0
        return max(1 - self.length_penalty * length / 100, 0.0)


def _check_pair(name: str, value: str | UserReward, weight: float) -> None:
    if bool(value) != bool(weight):
        raise UserError(
            f"{name} = {label(value)!r} and {name}_weight = {weight} do not go together; give both or neither"
        )


@dataclass
class RewardFailures:
    """How often the user's function was called and raised, and what it raised first."""

    name: str
    calls: int = 0
    failures: int = 0
    first: str = ""

    def count(self, error: Exception) -> None:
        """Adds one failure."""
        self.first = self.first or told(error)
        self.failures += 1

    def __str__(self) -> str:
        return f"{self.name} failed on {self.failures} of {self.calls} samples, first with {self.first}"


@dataclass
class Rewards:
    """Shaped rewards by the rules. Raises UserError where the form or the user's function cannot be used at all."""

    rules: RewardRules
    failures: RewardFailures = field(init=False)

    def __post_init__(self) -> None:
        self.failures = RewardFailures(label(self.rules.user))
        self._form = compile_form(self.rules.form)
        self._user = load_reward(self.rules.user) if self.rules.user else None

    def try_on(self, problem: Problem) -> None:
        """Calls the user's function once, before long work starts. Raises UserError where it fails."""
        if self._user is None:
            return
        try:
            value = self._user(problem.question, problem.worked or problem.gold, problem.gold)
        except Exception as error:
            raise UserError(f"{self.failures.name} failed on a first sample with {told(error)}") from error
        _checked(value, self.failures.name)

    def check_limit(self, limit: int) -> None:
        """Raises UserError where the token budget is no tighter than the limit of an answer's tokens."""
        if self.rules.token_budget >= limit:
            raise UserError(
                f"`token_budget` {self.rules.token_budget} is not below the limit `max_new_tokens` {limit}, so it "
                "would change nothing; lower the one or raise the other"
            )

    def shaped(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        verdicts: Sequence[Verdict],
        lengths: Sequence[int],
        limit: int,
    ) -> list[float]:
        """A reward from -1 to 1 for each completion; `lengths` are its tokens, at most `limit` were allowed."""
        rows = zip(problems, completions, verdicts, lengths, strict=True)
        return [self._shaped(*row, limit) for row in rows]

    def _shaped(self, problem: Problem, completion: str, verdict: Verdict, length: int, limit: int) -> float:
        rules, worth = self.rules, self.rules.worth(length)
        total = rules.verdict_weight * verdict.reward * worth
        if self._form is not None:
            total += rules.form_weight * bool(self._form.search(completion))
        if self._user is not None:
            mark = self._asked(self._user, problem, completion)
            if mark is None:
                return 0.0
            total += rules.user_weight * mark * (1.0 if rules.verdict_weight else worth)
        mean = total / (rules.verdict_weight + rules.form_weight + rules.user_weight)
        return mean + overlong_penalty(length, limit, rules.overlong_cache)

    def _asked(self, user: UserReward, problem: Problem, completion: str) -> float | None:
        """What the user's function gives, or None, counted, where it raises."""
        self.failures.calls += 1
        try:
            value = user(problem.question, completion, problem.gold)
        except Exception as error:  # any fault of the user's code: shown by whoever holds the tally
            self.failures.count(error)
            return None
        return _checked(value, self.failures.name)


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """DAPO's penalty from -1 to 0, falling over the last `cache` tokens before `limit`; 0 without a cache."""
    return -min(max((length - (limit - cache)) / cache, 0.0), 1.0) if cache else 0.0


def compile_form(form: str) -> re.Pattern[str] | None:
    """The regular expression of a form, or None of "". Raises UserError on one that is none."""
    try:
        return re.compile(form, re.DOTALL) if form else None
    except re.error as error:
        raise UserError(f"form = {form!r} is not a regular expression: {error}") from error


def load_reward(given: str | UserReward) -> UserReward:
    """The function that is given, by itself or by a name: see `plugins`.

    Raises UserError where it cannot be had or does not take a prompt, a completion and a gold answer.
    """
    function, name = resolve(REWARDS, given), label(given)
    if not callable(function):
        raise UserError(f"{name!r} is no function but {shown(function)}")
    _check_signature(function, name)
    return function  # type: ignore[no-any-return]


def _check_signature(function: Callable[..., Any], name: str) -> None:
    try:
        inspect.signature(function).bind("prompt", "completion", "gold")
    except TypeError as error:
        raise UserError(f"{name!r} must take a prompt, a completion and a gold answer: {error}") from error


def _checked(value: Any, name: str) -> float:
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise UserError(f"{name} gave {value!r}, which is not a number from 0 to 1")
    return float(value)
