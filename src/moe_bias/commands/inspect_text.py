"""`moe-bias inspect-text`: both answers to a prompt, token by token, as a page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_bias.adapter.saved import adapter_folder
from moe_bias.analysis.both_answers import inspect
from moe_bias.analysis.inspection import InspectedToken, Inspection, shared_length
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.looking_settings import InspectTextSettings
from moe_bias.commands.run_lock import refuse_unwritable
from moe_bias.frozen import frozen
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.report.inspector import write_page
from moe_bias.training.problems import saved_layer

SHOWN_ROWS = 24
"""Rows of the terminal's table: the tokens at which the adapter does most."""
NEGLIGIBLE = 0.005
"""The table leaves out experts whose share would round to 0%."""
_HEAT = ("", "white on #2b2414", "white on #46350f", "white on #6b4310", "white on #a85412")
"""Styles by base entropy, from the lowest fifth up; each has its own foreground, so that any terminal can be read."""


def run(settings: InspectTextSettings) -> None:
    """Answers twice, reads both answers, prints them, and writes the page with its record.

    Raises UserError on an adapter that does not fit, and on a model without a chat template where one is
    asked for.
    """
    record = settings.output.with_suffix(".json")
    refuse_unwritable(settings.output.parent, (settings.output.name, record.name))
    adapter_folder(settings.adapter)
    base = frozen(settings)
    layer = saved_layer(settings.adapter, base.head).layer
    if settings.chat and not base.tokenizer.chat_template:
        raise UserError(f"the tokenizer of {settings.model!r} has no chat template; pass --no-chat for plain text")
    names, sizes = (settings.model, settings.adapter), (settings.max_new_tokens, settings.top)
    inspection = inspect(base, layer, *names, settings.prompt, settings.chat, *sizes, settings.rho)
    made_with = {"settings": settings.model_dump(mode="json"), "provenance": provenance()}
    write_json(record, {"kind": RecordKind.INSPECTION, "inspection": asdict(inspection), **made_with})
    write_page(settings.output, inspection)
    print_inspection(report_console(), inspection)
    text_console().print(f"The page is {settings.output}, its record {record}.", soft_wrap=True, highlight=False)


def print_inspection(console: Console, inspection: Inspection) -> None:
    """Both answers coloured by base entropy, forks underlined, and the tokens where the adapter does most."""
    hottest = max(token.entropy for answer in inspection.answers for token in answer.tokens)
    for answer in inspection.answers:
        console.print(Text(f"\n{answer.name}", style="bold"))
        console.print(coloured(answer.tokens, inspection.threshold, hottest))
    console.print(
        Text(f"\nColoured by base entropy, 0 to {hottest:.2f} nats; underlined from {inspection.threshold:.2f}", "dim")
    )
    console.print(_table(inspection))


def coloured(tokens: Sequence[InspectedToken], threshold: float, hottest: float) -> Text:
    """The answer's text. What a terminal would obey is shown as an escape."""
    text = Text()
    for token in tokens:
        level = min(int(len(_HEAT) * token.entropy / hottest), len(_HEAT) - 1) if hottest else 0
        underline = "underline" if token.entropy >= threshold else ""
        text.append(harmless(token.text), f"{_HEAT[level]} {underline}".strip())
    return text


def harmless(text: str) -> str:
    """The text with control characters, line ends apart, as escapes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def _table(inspection: Inspection) -> Table:
    alike = shared_length([answer.tokens for answer in inspection.answers])
    rows = [
        (token.kl, "both" if number <= alike else answer.name, number, token)
        for place, answer in enumerate(inspection.answers)
        for number, token in enumerate(answer.tokens, 1)
        if place == 0 or number > alike
    ]
    rows.sort(key=lambda row: -row[0])
    table = Table(title=f"The {min(SHOWN_ROWS, len(rows))} tokens of largest KL, in nats", title_justify="left")
    table.add_column("token")
    for heading in ("in", "entropy", "w", "|bias|", "KL"):
        table.add_column(heading, justify="left" if heading == "in" else "right", no_wrap=True)
    for heading in ("experts", "base says", "adapter says"):
        table.add_column(heading)
    for _, name, number, token in rows[:SHOWN_ROWS]:
        table.add_row(Text(repr(token.text)), f"{name} {number}", *_numbers(token), *_choices(token))
    return table


def _numbers(token: InspectedToken) -> list[str]:
    return [f"{value:.2f}" for value in (token.entropy, token.weight, token.bias, token.kl)]


def _choices(token: InspectedToken) -> list[Text]:
    experts = ", ".join(f"{expert} {share:.0%}" for expert, share in token.experts if share > NEGLIGIBLE)
    likeliest = [f"{text!r} {prob:.0%}" for text, prob in (token.base[0], token.adapted[0])]
    return [Text(experts), *(Text(choice) for choice in likeliest)]
