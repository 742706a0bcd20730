"""The tables of each kind of record that compares arms, for a terminal, a page, Markdown, LaTeX and the documentation.

Rows are those of the record, read or about to be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_bias.analysis.quantities import QUANTITIES
from moe_bias.evaluation.drafts import DRAFTS
from moe_bias.evaluation.equal_tokens import shown_limits
from moe_bias.evaluation.scores import CUT, DISTINCT, LOOPING, PASS, TOKENS
from moe_bias.evaluation.statistics import estimate_of, with_interval
from moe_bias.experiments.policy_arms import AGAINST, HELD_OUT, measured_after, percent_by_seed
from moe_bias.report.table import Column, Row, Table

_STRATA = {"all": "all tokens", "high": "high entropy", "low": "low entropy"}
CONTEXT = 70
"""Letters of the text before a token."""
FLIP_IN_SHORT = ("context, with the text's token", "KL, nats", "base goes on", "adapted goes on", "outcome")
"""Columns of `flips` that a terminal has room for."""
ARM = Column("arm", ("name",), words=True)
PARAMETERS = Column("parameters", ("parameters",), "{:,}")
SEEDS = Column("seeds", ("seeds",))


TO_ZERO_SHOT, LEAD = "to zero-shot, points", "moe-bias less it, points"


def percents(heading: str, *place: str | int, **more: Any) -> Column:
    """A share, in percent."""
    return Column(heading, place, "{:.1f}", 100, **more)


def points(heading: str, *place: str | int, **more: Any) -> Column:
    """The change of a share, in percentage points."""
    return Column(heading, place, "{:+.1f}", 100, **more)


def costs_of_cells(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the cells of a sweep, or arms on the same tokens, took; of one seed there is no spread."""
    rows = [{**row, "spread": row["spread"] if row["seeds"] > 1 else None} for row in rows]
    caption = "Spread: largest less smallest NLL of a seed. Seconds: features and training"
    spread = Column("spread", ("spread",), "{:.4f}")
    tokens, seconds = Column("tokens trained on", ("train_tokens",), "{:,}"), Column("seconds", ("seconds",), "{:,.1f}")
    return Table("costs", caption, [ARM, PARAMETERS, SEEDS, spread, tokens, seconds], rows)


def likelihoods(rows: Sequence[Row], base: str, name: str = "", held_out: int | None = None) -> Table:
    """Held-out NLL of cells and its change against `base`, by stratum, on so many `held_out` tokens."""
    nll = [Column(heading, ("nll", stratum), "{:.3f}") for stratum, heading in _STRATA.items()]
    to = {"all": f"change to {base}", "high": f"high, to {base}", "low": f"low, to {base}"}
    changes = [
        Column(to[stratum], ("change", stratum), "{:+.3f}", below=heading) for stratum, heading in _STRATA.items()
    ]
    caption = (
        f"Held-out NLL{'' if held_out is None else f' of {held_out:,} tokens'}, nats per token [95% interval over "
        f"examples]; high entropy: the 20% of highest base entropy; changes to {base} are paired"
    )
    return Table(name, caption, [ARM, *nll, *changes], rows)


def costs_of_arms(rows: Sequence[Row]) -> Table:
    """What the arms of reinforcement learning took."""
    caption = "Cost of an arm: means over seeds; memory is the process's peak, model included"
    spent = [
        Column("tokens sampled", ("sampled_tokens",), "{:,}"),
        Column("seconds", ("seconds",), "{:,.0f}"),
        Column("of it updating", ("updating_share",), "{:.1%}"),
        Column("peak MiB", ("peak_bytes",), "{:,.0f}", 1 / 2**20),
    ]
    return Table("costs", caption, [ARM, PARAMETERS, SEEDS, *spent], rows)


def solved(rows: Sequence[Mapping[str, Any]], name: str = "") -> Table:
    """The share of the problems that each arm of reinforcement learning solves, its changes, and tokens of answers."""
    columns, sets = [ARM, Column("by seed, %", ("shown_by_seed",))], measured_after(rows[0]["accuracy"])
    for found in sets:
        gained = "gained, points" if found == HELD_OUT else f"gained {found}, points"
        columns += [percents(f"{found}, %", "accuracy", found), points(gained, "gain", found)]
    columns += [points(f"to {other}, points", "change", other) for other in AGAINST if other in others_of(rows)]
    columns += [Column(f"tokens, {found}", ("tokens", found), "{:,.0f}") for found in sets]
    columns.append(Column("tokens gained", ("tokens_gain", HELD_OUT), "{:+,.0f}"))
    caption = (
        "Problems solved by greedy answers, means over seeds [95% interval over problems]; 'gained' by the steps; 'by "
        f"seed' is '{HELD_OUT}' of each training; changes to other arms are of '{HELD_OUT}', paired by problem"
    )
    rows = [{**row, "shown_by_seed": percent_by_seed(row["by_seed"])} for row in rows]
    return Table(name, caption, columns, rows).without_empty_columns()


def scores(arms: Sequence[Mapping[str, Any]], caption: str = "", name: str = "", more: Sequence[Column] = ()) -> Table:
    """Accuracy of the arms of an evaluation, and how their samples end; `more` columns may follow."""
    passes, failures = arms[0]["pass_at"], arms[0]["failures"]
    columns = [
        ARM,
        percents("right, %", "accuracy"),
        *(points(f"to {other}, points", "change", other) for other in others_of(arms)),
        *(percents(f"pass@{k}, %", "pass_at", k) for k in passes),
        percents("majority, %", "majority"),
        Column("tokens", (TOKENS,), "{:,.0f}"),
        percents("cut, %", CUT),
        percents("loops, %", LOOPING),
        percents("distinct-4, %", DISTINCT),
        *(percents(f"{failure}, %", "failures", failure) for failure in failures),
        *more,
    ]
    return Table(name, caption, columns, arms).without_empty_columns()


def others_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms that others are compared with."""
    return list(dict.fromkeys(other for row in rows for other in row["change"]))


def writing(arms: Sequence[Mapping[str, Any]]) -> Table:
    """How the answers of an evaluation are written, and the changes against its first arm."""
    first = arms[0]["name"]
    forms = {
        TOKENS: ("tokens", "{:,.0f}", 1.0),
        CUT: ("cut", "{:.1f}", 100.0),
        LOOPING: ("loops", "{:.1f}", 100.0),
        DISTINCT: ("distinct-4", "{:.1f}", 100.0),
    }
    values = [Column(title, (key,), form, scale, bare=key == TOKENS) for key, (title, form, scale) in forms.items()]
    changes = [
        Column(f"{title}, to {first}", ("changes", key, first), form.replace(":", ":+"), scale, below=title)
        for key, (title, form, scale) in forms.items()
    ]
    caption = (
        "How the answers are written: tokens, % cut by the limit, % that loop, % of runs of four words that are "
        "different ones (distinct-4)"
    )
    against = f"; changes to {first} are paired by problem" if len(arms) > 1 else ""
    return Table("", caption + against, [ARM, *values, *changes], arms)


def passes(arms: Sequence[Mapping[str, Any]]) -> Table:
    """The share of problems of an evaluation that k samples solve, for every k that is told, and what changed."""
    first = arms[0]["name"]
    columns = [ARM]
    for k in ("1", *arms[0]["pass_at"]):
        heading, change = f"{PASS}{k}, %", (("change",) if k == "1" else ("changes", f"{PASS}{k}"))
        columns.append(percents(heading, *(("accuracy",) if k == "1" else ("pass_at", k))))
        columns.append(points(f"{PASS}{k} to {first}, points", *change, first, below=heading))
    caption = "Problems that at least one of k samples solves [95% interval over problems]"
    against = f"; changes to {first} are paired by problem, in points" if len(arms) > 1 else ""
    return Table("", caption + against, columns, arms).without_empty_columns()


def has_lengths(arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an evaluation knows how long all answers are; records of before do not say."""
    return all(arm.get("at_limits") for arm in arms)


def equal_tokens(arms: Sequence[Mapping[str, Any]], name: str = "") -> Table:
    """Accuracy of the arms of an evaluation under some limits of tokens, and the changes against its first arm."""
    first, limits = arms[0]["name"], [point["limit"] for point in arms[0]["at_limits"]]
    columns = [ARM, Column(f"tokens, % of {first}", ("token_share",), "{:.1f}", 100)]
    for limit in shown_limits(limits):
        heading, place = f"within {limit:,}, %", ("at_limits", limits.index(limit))
        columns.append(percents(heading, *place, "accuracy"))
        columns.append(points(f"within {limit:,} to {first}, points", *place, "change", below=heading))
    caption = (
        "Accuracy at equal tokens: samples that are right and ended by themselves within a limit [95% interval over "
        "problems]"
    )
    against = f"; changes to {first} are paired by problem, in points" if len(arms) > 1 else ""
    return Table(name, caption + against, columns, arms).without_empty_columns()


def changes_in_writing(arms: Sequence[Mapping[str, Any]], name: str) -> Table:
    """Of each arm of an evaluation to each before it, what changed in how the answers are written."""
    rows = [
        {"name": arm["name"], "to": other} | {key: found.get(other) for key, found in arm["changes"].items()}
        for arm in arms
        for other in arm["change"]
    ]
    columns = [
        ARM,
        Column("to", ("to",), words=True),
        Column("tokens", (TOKENS,), "{:+,.0f}"),
        points("cut, points", CUT),
        points("loops, points", LOOPING),
        points("distinct-4, points", DISTINCT),
    ]
    caption = (
        "Change of how the answers are written, paired by problem [95% interval over problems]: an answer loops that "
        "ends in a block repeated 4 times or more; distinct-4 is the share of runs of four words that are different"
    )
    return Table(name, caption, columns, rows).without_empty_columns()


def by_group(arms: Sequence[Mapping[str, Any]], column: str, name: str = "") -> Table:
    """Accuracy of the arms of an evaluation by the values of one column of its problems."""
    rows = [
        {column: value, "problems": group["problems"]} | {arm["name"]: _in_group(arm, column, value) for arm in arms}
        for value, group in arms[-1]["groups"][column].items()
    ]
    columns = [
        Column(column, (column,), words=True),
        Column("problems", ("problems",), "{:,}"),
        *(percents(f"{arm['name']}, %", arm["name"]) for arm in arms),
    ]
    return Table(name, f"Samples right by {column} [95% interval over problems]", columns, rows)


def _in_group(arm: Mapping[str, Any], column: str, value: str) -> Any:
    return arm["groups"][column][value]["accuracy"]


def demonstration(arms: Sequence[Mapping[str, Any]], caption: str, name: str = "") -> Table:
    """NLL, accuracy and answers of the demonstration's arms, each against the one before it."""
    columns = [
        ARM,
        Column("parameters", ("parameters",), "  {:,}", below="arm"),
        Column("NLL per token", ("nll",), "{:.3f}"),
        Column("change of NLL", ("nll_change",), "{:+.3f}", below="NLL per token"),
        Column("accuracy", ("accuracy",), "{:.1%}"),
        Column("change of accuracy", ("accuracy_change",), "{:+.1%}", below="accuracy"),
        Column("tokens", ("tokens",), "{:.1f}", bare=True),
        Column("cut off", ("cut",), "{:.0%}"),
    ]
    return Table(name, caption, columns, [{**arm, "parameters": arm.get("parameters") or None} for arm in arms])


def strata(adapter: Mapping[str, Any], name: str = "", caption: str = "") -> Table:
    """What an adapter does to the tokens of an analysis, by the base's entropy."""
    found: Mapping[str, Any] = adapter["strata"]
    return Table.of_texts(name, caption, ["means over tokens", *found], _strata(found))


def _strata(found: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["tokens", *(f"{stratum['tokens']:,}" for stratum in found.values())]
    for name, row in QUANTITIES.items():
        means = (estimate_of(stratum["means"][name]) for stratum in found.values())
        yield [row.heading, *(with_interval(mean, row.form, row.factor) for mean in means)]
    yield ["largest |b|", *(f"{stratum['bias_max']:.2f}" for stratum in found.values())]
    yield ["entropy of expert use, nats", *(f"{stratum['expert_entropy']:.3f}" for stratum in found.values())]


def right_answers(answers: Mapping[str, Any], name: str = "") -> Table:
    """How many problems of an analysis each arm solves, and what became of the base's answers."""
    accuracy, change = answers["accuracy"], answers["change"]
    rows = [{"name": arm, "right": share, "change": change.get(arm)} for arm, share in accuracy.items()]
    turns = ", ".join(f"{turn}: {count:,}" for turn, count in answers["turns"].items())
    caption = f"Problems solved, and the paired change to the base [95% interval over problems]. {turns}"
    return Table(name, caption, [ARM, percents("right, %", "right"), points("change, points", "change")], rows)


def flips(found: Sequence[Mapping[str, Any]], caption: str, name: str = "", folded: bool = False) -> Table:
    """Places of an analysis where the choice of token changes, and what both models go on with."""
    words = {
        "problem": "question",
        "gold answer": "gold",
        "context, with the text's token": "context",
        "base goes on": "base",
        "adapted goes on": "adapted",
        "outcome": "outcome",
    }
    columns = [Column(heading, (key,), words=True) for heading, key in words.items()]
    columns += [Column("entropy, nats", ("base_entropy",), "{:.2f}"), Column("KL, nats", ("kl",), "{:.2f}")]
    return Table(name, caption, columns, [_flip(one) for one in found], folded).without_empty_columns()


def _flip(flip: Mapping[str, Any]) -> dict[str, Any]:
    before, token = in_context(flip)
    sides = ("base", "adapted")
    outcomes = [str(flip[f"{side}_outcome"]) for side in sides if f"{side}_outcome" in flip]
    words = {side: flip.get(f"{side}_continuation") or flip[f"{side}_choice"]["text"] for side in sides}
    return {
        **flip,
        "context": f"{before}⟦{token}⟧",
        "outcome": " → ".join(outcomes),
        **{side: _on_one_line(text) for side, text in words.items()},
    }


def in_context(moment: Mapping[str, Any]) -> tuple[str, str]:
    """The end of the text before a token, and the token, on one line."""
    before = moment["before"]
    cut = "…" if len(before) > CONTEXT else ""
    return _on_one_line(f"{cut}{before[-CONTEXT:]}"), _on_one_line(moment["token"]["text"])


def _on_one_line(text: str) -> str:
    return text.replace("\n", "↵")


def ways(rows: Sequence[Row], name: str = "") -> Table:
    """Every way with every number of labelled texts."""
    columns = [
        Column("way", ("way",), words=True),
        Column("labels", ("count",), "{:,}"),
        SEEDS,
        percents("right, %", "accuracy"),
        points(TO_ZERO_SHOT, "change", "accuracy"),
        points(LEAD, "lead", "accuracy"),
        percents("ECE, %", "ece"),
        Column("NLL, nats", ("nll",), "{:.3f}"),
        Column("NLL, moe-bias less it", ("lead", "nll"), "{:+.3f}"),
        PARAMETERS,
        Column("seconds", ("seconds",), "{:,.1f}"),
        Column("of choosing", ("search_seconds",), "{:,.1f}"),
    ]
    caption = (
        "Means over seeds [95% interval over texts]; ECE: calibration error of 15 bins; changes are paired by text; "
        "seconds of training with what was chosen, and of choosing it"
    )
    return Table(name, caption, columns, rows)


def drafts(rows: Sequence[Row], name: str = "", more: Sequence[Column] = ()) -> Table:
    """How good a draft is under each arm, the first one the draft as it is; `more` columns come second."""
    columns = [
        ARM,
        *more,
        percents("accepted, %", "accepted"),
        percents("rejected, % of plain", "rejected"),
        Column("tokens a pass", ("tokens",), "{:.2f}"),
        percents("same likeliest, %", "agreement"),
        Column("KL from target, nats", ("kl",), "{:.3f}"),
    ]
    caption = (
        f"Of held-out tokens, with 95% intervals over answers. Tokens a pass: expected of one pass of the target after "
        f"{DRAFTS} drafts"
    )
    return Table(name, caption, columns, rows)


def probes(content: Mapping[str, Any], name: str = "") -> Table:
    """What each probe of a record was measured to do, and what more tokens are expected to bring to the layer."""
    rows: list[Row] = []
    for probe in content["probes"]:
        title = f"{probe['name']} (best)" if probe["name"] == content["best"] else probe["name"]
        rows.append({**probe, "name": title, "change": probe["change"] if probe["parameters"] else {}})
    for tokens, nll in sorted(content["forecast"]["nll"].items(), key=lambda expected: int(expected[0])):
        rows.append({"name": f"moe-bias, {int(tokens):,} tokens, expected", "nll": {"all": nll}})
    columns = [
        Column("probe", ("name",), words=True),
        PARAMETERS,
        Column("held-out NLL", ("nll", "all"), "{:.3f}"),
        Column("change", ("change", "all"), "{:+.3f}"),
        Column("of high entropy", ("change", "high"), "{:+.3f}"),
        Column("of low entropy", ("change", "low"), "{:+.3f}"),
        percents("right there, %", "picked"),
    ]
    caption = (
        "NLL in nats per token [95% interval over examples], paired change to the base, and how often the answer's "
        "token is the likeliest one at high entropy; what is expected has its interval over learning curves"
    )
    return Table(name, caption, columns, rows)
