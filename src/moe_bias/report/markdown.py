"""The report as Markdown, with the same content as the page; figures are links to their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_bias.analysis import Reading, TokenBias, marked, spelled
from moe_bias.analysis.inspection import InspectedToken, Inspection
from moe_bias.report.content import Cards, Note, Part, Plot, Report
from moe_bias.report.table import Table

_SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]<>|#"})


def markdown(report: Report) -> str:
    """The file's text."""
    lines = [f"# {_escaped(report.title)}", "", f"Model: {_escaped(report.model)}. Brackets are 95% intervals.", ""]
    lines += [f"- {_escaped(name)}: {kind}" for name, kind in report.runs]
    for topic, blocks in report.sections():
        lines += ["", f"## {topic.value}"]
        for block in blocks:
            if len(report.runs) > 1 and block.run:
                lines += ["", f"### {_escaped(block.run)}"]
            for part in block.parts:
                lines += ["", *_part(part)]
    return "\n".join(lines) + "\n"


def _part(part: Part) -> Iterator[str]:
    if isinstance(part, Note):
        yield f"**{_escaped(part.text)}**" if part.lead else _escaped(part.text)
    elif isinstance(part, Plot):
        yield f"![{_escaped(part.title)}](figures/{part.name}.svg)"
        if part.caption:
            yield from ("", _escaped(part.caption))
    elif isinstance(part, Table):
        yield from (f"{_escaped(part.caption)}:", "", *_table(part))
    elif isinstance(part, Cards):
        yield from _cards(part)
    else:
        yield from _inspection(part)


def _table(table: Table) -> Iterator[str]:
    yield _row(table.headings)
    yield _row(["---" if column.words else "---:" for column in table.columns], escape=False)
    for row in table.cells:
        yield _row(row)


def _row(cells: Sequence[str], escape: bool = True) -> str:
    return f"| {' | '.join(_escaped(cell) if escape else cell for cell in cells)} |"


def _cards(part: Cards) -> Iterator[str]:
    names = [name for name, _ in part.cards[0].facts] if part.cards else []
    reads = any(card.view.readings for card in part.cards)
    rows = [
        [
            str(card.expert),
            *(value for _, value in card.facts),
            *(_moved(side) for side in (card.view.raised, card.view.lowered)),
            *([" / ".join(map(_reading, card.view.readings))] if reads else []),
            " / ".join(f"{before}⟦{token}⟧" for before, token in card.contexts),
        ]
        for card in part.cards
    ]
    yield from (_escaped(part.caption), "")
    headings = ["expert", *names, "raises", "lowers", *(["reads"] if reads else []), "fires most in"]
    yield from _table(Table.of_texts("", "", headings, rows))


def _moved(tokens: Sequence[TokenBias]) -> str:
    return ", ".join(f"{marked(token)} {token.bias:+.1f}" for token in tokens)


def _reading(reading: Reading) -> str:
    toward, away = (", ".join(map(spelled, side)) or "-" for side in (reading.toward, reading.away))
    moves = f"raises {_moved(reading.raised)}, lowers {_moved(reading.lowered)}"
    return f"size {reading.size:.3g}: leaning to {toward}, away from {away}, {moves}"


def _inspection(part: Inspection) -> Iterator[str]:
    yield f"Prompt: {_escaped(part.prompt)}"
    for answer in part.answers:
        text = "".join(token.text for token in answer.tokens)
        yield from (
            "",
            f"{answer.name}, {len(answer.tokens):,} tokens:",
            "",
            *(f"> {_escaped(line)}" for line in text.split("\n")),
        )
    flips = [
        (answer.name, place, token)
        for answer in part.answers
        for place, token in enumerate(answer.tokens, 1)
        if token.flip
    ]
    yield from (
        "",
        f"Where the likeliest token is another one ({len(flips)} tokens; all numbers are in report.html):",
        "",
    )
    headings = ["in", "token", "base entropy", "KL", "base's likeliest", "adapter's likeliest"]
    yield from _table(Table.of_texts("", "", headings, (_flip(*flip) for flip in flips), words=2))


def _flip(name: str, place: int, token: InspectedToken) -> list[str]:
    likeliest = [f"{text!r} {prob:.1%}" for text, prob in (token.base[0], token.adapted[0])]
    return [f"{name} {place}", repr(token.text), f"{token.entropy:.3f}", f"{token.kl:.3f}", *likeliest]


def _escaped(text: str) -> str:
    """The text on one line, without a meaning in Markdown or HTML."""
    return " ".join(text.replace("&", "&amp;").translate(_SPECIAL).split())
