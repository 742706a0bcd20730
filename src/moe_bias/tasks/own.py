"""A user's own task: made with its options, and held to what `task.Task` promises before anything long begins."""

from __future__ import annotations

import inspect
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from moe_bias.mistakes import UserError, shown
from moe_bias.plugins import told
from moe_bias.tasks.options import fitted
from moe_bias.tasks.task import Problem, Task, too_few
from moe_bias.tasks.verdict import OUTCOMES, Verdict

_MEMBERS = {"name": "name", "problems": "problems(count, seed)", "verify": "verify(problems, completions)"}
_DRAWN_AGAIN = 4
"""Problems that are drawn twice, to see whether the seed decides them."""


@dataclass(frozen=True)
class OwnTask:
    """A task of a user's; what it gives is looked at, and what it raises is told in a sentence."""

    task: Task
    given: str

    @property
    def name(self) -> str:
        """The task's own."""
        return self.task.name

    def problems(self, count: int, seed: int) -> list[Problem]:
        """The task's problems, after a first answer was verified.

        Raises UserError where they are not `count` different ones or not the same for the same seed, and where the
        task fails.
        """
        found = self._drawn(count, seed)
        few = min(count, _DRAWN_AGAIN)
        if self._drawn(few, seed) != self._drawn(few, seed):
            raise self._fault("draws other problems each time for one seed; draw them by random.Random(seed)")
        if found:
            self.verify(found[:1], [found[0].worked or found[0].gold])
        return found

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """The task's verdicts. Raises UserError where they are not one for each completion, and where it fails."""
        found = self._asked("verify", problems, completions)
        if len(found) != len(completions):
            raise self._fault(f"verify gave {len(found)} verdicts for {len(completions)} completions")
        for verdict in found:
            if not isinstance(verdict, Verdict):
                raise self._fault(f"verify gave {shown(verdict)}, which is no Verdict")
            if verdict.outcome not in OUTCOMES:
                known = ", ".join(map(repr, OUTCOMES))
                raise self._fault(f"verify gave the outcome {shown(verdict.outcome)}, which is none of {known}")
            reward: Any = verdict.reward
            if not isinstance(reward, Real) or not 0 <= float(reward) <= 1:
                raise self._fault(f"verify gave a reward of {shown(reward)}, which is not a number from 0 to 1")
        return found

    def _drawn(self, count: int, seed: int) -> list[Problem]:
        found = self._asked("problems", count, seed)
        for problem in found:
            if not isinstance(problem, Problem):
                raise self._fault(f"problems gave {shown(problem)}, which is no Problem")
            if not isinstance(problem.question, str) or not isinstance(problem.gold, str):
                raise self._fault(f"question and gold answer are texts, not {shown((problem.question, problem.gold))}")
        questions = Counter(problem.question for problem in found)
        if len(questions) < len(found):
            question, times = questions.most_common(1)[0]
            raise self._fault(f"problems gave {shown(question)} {times} times; no question may stand twice")
        if len(found) < count:
            raise too_few(self.given, len(found), count)
        if len(found) > count:
            raise self._fault(f"problems gave {len(found)}, {count} were asked for")
        return found

    def _asked(self, method: str, *asked: Any) -> list[Any]:
        try:
            found = getattr(self.task, method)(*asked)
        except UserError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise self._fault(f"{method} failed with {told(error)}{_place(error)}") from error
        if not isinstance(found, Sequence) or isinstance(found, str):
            raise self._fault(f"{method} gave {shown(found)}, which is no list")
        return list(found)

    def _fault(self, reason: str) -> UserError:
        return UserError(f"task {self.given}: {reason}")


def own_task(found: Any, options: Mapping[str, Any], given: str) -> Task:
    """The task that a user's object is, or that a user's class or function makes of the options.

    Raises UserError on options that it does not take, and where what is made is no task.
    """
    if inspect.isclass(found) or (callable(found) and not _is_task(found)):
        found = _made(found, fitted(given, found, options), given)
    elif options:
        raise UserError(f"task {given} is an object and takes no options, not {', '.join(options)}; name its class")
    missing = [words for name, words in _MEMBERS.items() if not hasattr(found, name)]
    if missing:
        raise UserError(f"{given} is no task: its {type(found).__name__} has no {' and no '.join(missing)}")
    if not isinstance(found.name, str):
        raise UserError(f"{given} is no task: its name is {shown(found.name)}, which is no text")
    return found if type(found).__module__.startswith(f"{__package__}.") else OwnTask(found, given)


def _is_task(found: Any) -> bool:
    return all(hasattr(found, name) for name in _MEMBERS)


def _made(maker: Callable[..., Any], options: Mapping[str, Any], given: str) -> Any:
    try:
        return maker(**options)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        with_options = f" with {dict(options)}" if options else ""
        raise UserError(f"task {given} cannot be made{with_options}: {told(error)}{_place(error)}") from error


def _place(error: Exception) -> str:
    """Where in the user's code: the last line that was run."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
