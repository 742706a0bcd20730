"""What training and measuring return: figures with 95% intervals, shown as a table and a curve, or as a data frame."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import Any

from moe_bias.evaluation.drafts import DraftFigures
from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.scores import Score
from moe_bias.evaluation.statistics import Estimate, percent, with_interval
from moe_bias.evaluation.statistics import points as points_of
from moe_bias.experiments.cells import Row
from moe_bias.experiments.policy_arms import PolicyRow
from moe_bias.extras import need
from moe_bias.progress import text_console
from moe_bias.report.table import Column, Table
from moe_bias.report.tables import costs_of_arms, costs_of_cells, drafts, likelihoods, points, solved
from moe_bias.report.terminal import terminal_table

Curve = Sequence[Mapping[str, float]]
"""Metrics by name of each step, as `moe_bias.training.metrics` describes them, `step` among them."""
WIDTH = 100


class Report:
    """Base of what training and measuring return; `str` is a table, a notebook shows it with its curve."""

    curve: Curve
    CURVES: tuple[str, ...] = ()
    """Metrics that are drawn, where the curve has them."""

    @property
    def drawn(self) -> Sequence[str]:
        """Names in the curve that are drawn."""
        return self.CURVES

    @property
    def title(self) -> str:
        """One sentence above the table."""
        raise NotImplementedError

    @property
    def table(self) -> Table:
        """A row for each thing that was measured."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, str]]:
        """The table as texts: a row for each thing that was measured, by column."""
        table = self.table
        return [dict(zip(table.headings, row, strict=True)) for row in table.cells]

    def frame(self) -> Any:
        """What `numbers` gives, as a `pandas.DataFrame`. Raises UserError where pandas is not installed."""
        need("pandas", "a data frame")
        import pandas

        return pandas.DataFrame(self.numbers())

    def numbers(self) -> list[Mapping[str, Any]]:
        """The curve, a row for each step; where there is no curve the table, with the ends of intervals."""
        return list(self.curve) or list(self.table.values())

    def __repr__(self) -> str:
        text = StringIO()
        # A console in a notebook draws on the page, whatever its file is, unless it is told not to.
        console = text_console(file=text, width=WIDTH, color_system=None, highlight=False, force_jupyter=False)
        console.print(self.title)
        console.print(terminal_table(self.table))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The table, and the curves where matplotlib is installed."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.table.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in self.table.cells
        )
        return f"<p>{html.escape(self.title)}</p><table><tr>{head}</tr>{body}</table>{self._drawn()}"

    def _drawn(self) -> str:
        try:
            from moe_bias.report.figures import curves, page_svg
        except ImportError:
            return ""
        lines = {name: line for name in self.drawn if (line := self._line(name))[0]}
        return page_svg(curves(lines, "step", ""), "curve", self.title) if lines else ""

    def _line(self, name: str) -> tuple[list[float], list[float]]:
        known = [step for step in self.curve if name in step]
        return [step["step"] for step in known], [step[name] for step in known]


@dataclass(frozen=True, repr=False)
class SFTReport(Report):
    """What supervised training did to the answers that were held out, in nats per token with 95% intervals.

    `change` is paired by example. `layer_step` is the step that the layer is of, of so many `steps`, and `layer_nll`
    the held-out NLL that the run itself took there, None where it took none. Of an objective of pairs NLL is that of
    the chosen answers, and `preferred` the share of held-out pairs whose chosen answer gained more than the other.
    """

    base_nll: Estimate
    adapted_nll: Estimate
    change: Estimate
    steps: int
    layer_step: int
    layer_nll: float | None
    parameters: int
    train_tokens: int
    held_out_tokens: int
    curve: Curve = field(default=(), compare=False)
    preferred: Estimate | None = None
    CURVES = ("nll", "held_out_nll", "preferred")

    @property
    def title(self) -> str:
        """One sentence of result."""
        verb = "falls" if self.change.value < 0 else "rises"
        what = f"Held-out NLL {verb} by {abs(self.change.value):.3f} nats per token"
        if self.preferred is not None:
            what = f"The chosen answer gains more in {with_interval(self.preferred, '{:.1%}')} of the held-out pairs"
        made = f"{self.steps:,} steps on {self.train_tokens:,} tokens ({self.parameters:,} parameters)"
        return f"{what} {'in' if self.preferred is None else 'after'} {made}"

    @property
    def table(self) -> Table:
        """Base, adapted and their difference."""
        heading = "held-out NLL, nats per token" if self.preferred is None else "NLL of chosen answers, nats per token"
        named = {"base": self.base_nll, "adapted": self.adapted_nll, "change": self.change}
        return _table([Column("", (0,), words=True), Column(heading, (1,), "{:.3f}")], list(named.items()))


@dataclass(frozen=True, repr=False)
class DraftReport(Report):
    """How good a draft model is for speculative decoding of a larger one, on held-out answers, with 95% intervals.

    `figures` are those of the draft as it is, "plain", and of "adapted": `accepted`, the expected share of its tokens
    that the target accepts; `rejected`, the share it does not over that of "plain"; `tokens`, expected of one pass of
    the target after four drafts; `agreement` of the likeliest tokens; `kl` from the target in nats a token. All but
    agreement at temperature 1.
    """

    figures: Mapping[str, DraftFigures]
    steps: int
    layer_step: int
    layer_loss: float | None
    parameters: int
    train_tokens: int
    held_out_tokens: int
    support_mass: float
    curve: Curve = field(default=(), compare=False)
    CURVES = ("forward_kl", "held_out_loss")

    @property
    def title(self) -> str:
        """One sentence of result."""
        adapted, made = self.figures["adapted"], f"{self.steps:,} steps on {self.train_tokens:,} tokens"
        what = f"The target accepts {percent(adapted.accepted)}% of the draft's tokens"
        if adapted.rejected is not None:
            what = f"Of the tokens that the target rejects {percent(adapted.rejected)}% are left"
        return f"{what} after {made} ({self.parameters:,} parameters)"

    @property
    def table(self) -> Table:
        """The draft as it is, and adapted."""
        return drafts(self.record_rows())

    def record_rows(self) -> list[dict[str, Any]]:
        """The figures as a record has them."""
        return [{"name": name, **figures.record()} for name, figures in self.figures.items()]


@dataclass(frozen=True, repr=False)
class RLReport(Report):
    """What steps of rewards did to greedy answers to held-out problems, with 95% intervals.

    `accuracy` and `tokens`, the length of an answer with its end token, are of the policies "base", "start" and
    "trained"; `change` and `tokens_change` are trained less start, paired by problem. `right` says by policy whether
    each problem was solved, `lengths` in how many tokens it was answered.
    """

    accuracy: Mapping[str, Estimate]
    change: Estimate
    right: Mapping[str, Sequence[bool]]
    tokens: Mapping[str, Estimate]
    tokens_change: Estimate
    lengths: Mapping[str, Sequence[int]]
    steps: int
    sampled_tokens: int
    seconds: float
    update_seconds: float
    curve: Curve = field(default=(), compare=False)
    CURVES = ("reward", "held_out_accuracy", "tokens_per_answer")

    @property
    def title(self) -> str:
        """One sentence of result."""
        share = self.update_seconds / max(self.seconds, 1e-9)
        return (
            f"{points_of(self.change)} points and {with_interval(self.tokens_change, '{:+,.0f}')} tokens an answer by "
            f"{self.steps:,} steps of rewards, {self.sampled_tokens:,} tokens sampled; {share:.1%} of "
            f"{self.seconds:,.0f} s was updating"
        )

    @property
    def table(self) -> Table:
        """Accuracy of each policy, and how long its answers are."""
        rows = [(name, value, self.tokens[name]) for name, value in self.accuracy.items()]
        columns = [
            Column("policy", (0,), words=True),
            Column("held-out problems solved", (1,), "{:.1%}"),
            Column("tokens", (2,), "{:,.0f}"),
        ]
        return _table(columns, rows)


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """Policies on the same problems, compared in pairs; `scores` are in the order in which policies were given.

    `samples` are all answers with their verdicts, `prompts` the user's turns by the problems' ids; `chat` says whether
    they were put into the model's chat template. `instruction` stood below the prompts of the policy 'instructed'.
    """

    problems: str
    count: int
    scores: Sequence[Score]
    samples: Sequence[Sample]
    prompts: Mapping[str, str]
    chat: bool
    instruction: str = ""
    curve: Curve = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.count:,} problems of {self.problems}: % solved [95% interval over problems]"

    def __getitem__(self, name: str) -> Score:
        """The score of the policy of this name. Raises KeyError where there is none."""
        return {score.name: score for score in self.scores}[name]

    @property
    def table(self) -> Table:
        """Accuracy of each policy, its change to the first, and how its answers are written."""
        first = self.scores[0].name
        columns = [
            Column("policy", ("name",), words=True),
            Column("solved", ("accuracy",), "{:.1%}"),
            points(f"to {first}, points", "change", first),
            *(Column(f"pass@{k}", ("pass_at", k), "{:.1%}") for k in list(self.scores[0].pass_at)[-1:]),
            Column("tokens", ("tokens",), "{:,.0f}", bare=True),
            *self._within_half(),
            Column("loops", ("looping",), "{:.0%}", bare=True),
        ]
        return _table(columns if len(self.scores) > 1 else [*columns[:2], *columns[3:]], self.scores)

    def _within_half(self) -> list[Column]:
        """Accuracy at equal tokens, half of the longest answer's; the scores' `at_limits` have every limit."""
        limits = self.scores[0].at_limits
        if not limits:
            return []
        middle = (len(limits) - 1) // 2
        return [Column(f"within {limits[middle].limit:,}", ("at_limits", middle, "accuracy"), "{:.1%}", bare=True)]


@dataclass(frozen=True, repr=False)
class ArmsReport(Report):
    """Arms or cells of a grid on the same held-out tokens, each over its seeds; changes are paired by example.

    `arms` are in the order in which they were run, `base` is the one that the others are compared with.
    """

    arms: Sequence[Row]
    base: str
    held_out_tokens: int
    curve: Curve = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"NLL of {self.held_out_tokens:,} held-out tokens, nats per token [95% interval over examples]"

    def __getitem__(self, name: str) -> Row:
        """The arm of this name. Raises KeyError where there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    @property
    def tables(self) -> Sequence[Table]:
        """What each arm took, and its NLL and paired changes."""
        rows = [asdict(arm) for arm in self.arms]
        return costs_of_cells(rows), likelihoods(rows, self.base, held_out=self.held_out_tokens)

    @property
    def table(self) -> Table:
        """Parameters and NLL of each arm, and its paired changes against one of them."""
        return self._whole.only("arm", "parameters", "all tokens", f"change to {self.base}")

    def numbers(self) -> list[Mapping[str, Any]]:
        """What each arm took and its NLL and changes by stratum, with the ends of intervals."""
        return list(self._whole.values())

    @property
    def _whole(self) -> Table:
        costs, measured = self.tables
        columns = [*costs.columns, *(replace(column, below="") for column in measured.columns[1:])]
        return _table(columns, costs.rows)


@dataclass(frozen=True, repr=False)
class CompareReport(Report):
    """Arms of reinforcement learning on the same held-out problems, each over its seeds; changes are paired by problem.

    The curve has by step the share of the problems that each arm solves.
    """

    arms: Sequence[PolicyRow]
    curve: Curve = field(default=(), compare=False)

    @property
    def drawn(self) -> Sequence[str]:
        """All arms."""
        return [arm.name for arm in self.arms]

    @property
    def title(self) -> str:
        """What was measured."""
        return "Held-out problems solved by greedy answers, % [95% interval over problems], means over seeds"

    def __getitem__(self, name: str) -> PolicyRow:
        """The arm of this name. Raises KeyError where there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    @property
    def tables(self) -> Sequence[Table]:
        """What each arm took, what it solves, and its paired changes against others with the tokens of its answers."""
        whole = self._whole
        after = [heading for heading in whole.headings if heading.startswith(("to ", "tokens"))]
        before = [heading for heading in whole.headings if heading not in after]
        caption = "Paired changes of the held-out problems solved, in points, to other arms; and tokens of an answer"
        changes = replace(whole.only("arm", *after), caption=caption)
        return costs_of_arms([asdict(arm) for arm in self.arms]), whole.only(*before), *([changes] if after else [])

    @property
    def table(self) -> Table:
        """Accuracy of each arm, what its steps gained, and its paired changes against others, in points."""
        others = [heading for heading in self._whole.headings if heading.startswith("to ")]
        return replace(
            self._whole.only("arm", "held out, %", "gained, points", *others, "tokens, held out"), caption=""
        )

    def numbers(self) -> list[Mapping[str, Any]]:
        """What each arm solves, and its changes, with the ends of intervals."""
        return list(self._whole.values())

    @property
    def _whole(self) -> Table:
        return solved([asdict(arm) for arm in self.arms])


def _table(columns: Sequence[Column], rows: Sequence[Any]) -> Table:
    return Table("", "", columns, rows)
