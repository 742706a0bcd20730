"""What a report says of accuracy and length: curves under limits, an adapter's strengths, a table of some limits."""

from dataclasses import asdict
from pathlib import Path

from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.scores import scores
from moe_bias.records import RecordKind
from moe_bias.report.content import Plot, Topic
from moe_bias.report.evaluation import evaluation
from moe_bias.report.record import Record
from moe_bias.report.table import Table


def record_of(arms, **of_arm):
    """Of five problems, of which each arm solves three in so many tokens each."""
    samples = [
        Sample(str(n), name, 0, "correct" if n < 3 else "wrong", "1", tokens + n, True, "a text")
        for name, tokens in arms.items()
        for n in range(5)
    ]
    found = [asdict(score) | {"strength": of_arm.get(score.name)} for score in scores(samples, list(arms), {})]
    content = {"problems": {"name": "sums", "count": 5}, "protocol": {"samples": 1}, "arms": found}
    return Record(Path("record.json"), "run", RecordKind.EVALUATION, content)


def length_of(record):
    (parts,) = (block.parts for block in evaluation(record) if block.topic is Topic.LENGTH)
    return {part.name: part for part in parts}


def drawn(plot):
    """What is written in a figure besides numbers."""
    (axes,) = plot.figure.axes
    return {text.get_text() for text in axes.texts}


def test_each_adapter_is_drawn_at_its_strengths_and_once_beside_the_others():
    arms = {"base": 90, "short x0.5": 60, "short x1": 40, "short x1.5": 30, "told": 80}
    strengths = {"short x0.5": 0.5, "short x1": 1.0, "short x1.5": 1.5}
    parts = length_of(record_of(arms, **strengths))
    assert [name for name, part in parts.items() if isinstance(part, Plot)] == [
        "run-equal-tokens",
        "run-equal-tokens-short",
        "run-trade-off",
    ]
    assert drawn(parts["run-equal-tokens-short"]) == {"base", "short x0.5", "short x1", "short x1.5"}
    assert drawn(parts["run-trade-off"]) == {"base", "short", "told"}
    (axes,) = parts["run-trade-off"].figure.axes
    (short,) = [container for container in axes.containers if len(container.lines[0].get_xdata()) == 3]
    assert short.lines[0].get_xdata().tolist() == [62.0, 42.0, 32.0]  # mean tokens, in order of strength
    assert short.lines[0].get_ydata().tolist() == [60.0] * 3


def test_a_table_has_accuracy_under_some_limits_with_paired_changes():
    parts = [part for block in evaluation(record_of({"base": 90, "short": 40})) for part in block.parts]
    (table,) = [part for part in parts if isinstance(part, Table) and part.caption.startswith("Accuracy at equal")]
    assert table.headings[:4] == ["arm", "tokens, % of base", "within 12, %", "within 12 to base, points"]
    assert [row[0] for row in table.cells] == ["base", "short"]
    # (40 + ... + 44) of (90 + ... + 94) tokens; within 47 of 94 the one has all that it solves, the other nothing.
    place = table.headings.index("within 47, %")
    assert table.cells[1][1].startswith("45.7 [")
    assert (table.cells[0][place].split()[0], table.cells[1][place].split()[0]) == ("0.0", "60.0")
    assert table.cells[1][place + 1].startswith("+60.0 [")


def test_an_evaluation_without_lengths_has_no_such_block():
    record = record_of({"base": 10})
    for arm in record.content["arms"]:
        arm["at_limits"] = None
    assert Topic.LENGTH not in [block.topic for block in evaluation(record)]
    for arm in record.content["arms"]:
        del arm["at_limits"], arm["token_share"]  # as records of before are
    assert Topic.LENGTH not in [block.topic for block in evaluation(record)]
