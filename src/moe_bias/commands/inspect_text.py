"""`moe-bias inspect-text`: both answers to a prompt, token by token, as a page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_bias.adapter.saved import adapter_folder
from moe_bias.analysis.readings import TokenReadings, TopTokens, read_tokens, top_tokens
from moe_bias.backbone import Head, find_head
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.looking_settings import InspectTextSettings
from moe_bias.commands.run_lock import refuse_unwritable
from moe_bias.features.extract import run_backbone
from moe_bias.frozen import load_model
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.report.inspector import InspectedAnswer, InspectedToken, Inspection, shared_length, write_page
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import base_policy, layer_policy
from moe_bias.support import fork_threshold
from moe_bias.tasks.conversations import Conversation, Example, answer_ends, encode_prompt
from moe_bias.training.problems import saved_layer

NAMES = ("base", "adapted")
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
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    subject = Subject(model, tokenizer, head, saved_layer(settings.adapter, head).layer)
    inspection = inspect(subject, settings)
    made_with = {"settings": settings.model_dump(mode="json"), "provenance": provenance()}
    write_json(record, {"kind": RecordKind.INSPECTION, "inspection": asdict(inspection), **made_with})
    write_page(settings.output, inspection)
    print_inspection(report_console(), inspection)
    text_console().print(f"The page is {settings.output}, its record {record}.", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Subject:
    """A frozen model with its tokenizer and output embedding, and the layer to look at."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    layer: MoEBiasLayer


def inspect(subject: Subject, settings: InspectTextSettings) -> Inspection:
    """Both greedy answers, their end token included, read by both models. Raises UserError as `run` does."""
    conversation = _conversation(subject.tokenizer, settings)
    prompt_ids = encode_prompt(conversation, subject.tokenizer)
    columns = greedy_answers(
        subject.model,
        subject.head,
        [prompt_ids],
        [base_policy, layer_policy(subject.layer, subject.head.transform)],
        stop_ids=answer_ends(subject.model, subject.tokenizer, settings.chat),
        max_new_tokens=settings.max_new_tokens,
        batch_size=1,
    )
    answers = [column[0] for column in columns]
    ids = [answer.all_ids for answer in answers]
    read = [_read(subject, Example(prompt_ids, written), settings.top) for written in ids]
    entropy_T = torch.cat([readings.base_entropy for readings, _ in read])
    return Inspection(
        model=settings.model,
        adapter=settings.adapter,
        prompt=settings.prompt,
        rho=settings.rho,
        threshold=fork_threshold(entropy_T, settings.rho),
        answers=[
            InspectedAnswer(name, answer.finished, _tokens(subject.tokenizer, written, *both))
            for name, answer, written, both in zip(NAMES, answers, ids, read, strict=True)
        ],
    )


def _conversation(tokenizer: PreTrainedTokenizerBase, settings: InspectTextSettings) -> Conversation:
    if settings.chat and not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {settings.model!r} has no chat template; pass --no-chat for plain text")
    return Conversation(({"role": "user", "content": settings.prompt},), "", is_chat=settings.chat)


def _read(subject: Subject, example: Example, top: int) -> tuple[TokenReadings, TopTokens]:
    """What both models make of an answer's tokens, from one pass of the backbone."""
    hidden = run_backbone(subject.model, [example], 1, "reading")
    readings = read_tokens(subject.layer, subject.head, hidden.hidden, hidden.token)
    return readings, top_tokens(subject.layer, subject.head, hidden.hidden, min(top, subject.head.vocab_size))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], readings: TokenReadings, top: TopTokens
) -> list[InspectedToken]:
    def spelled(ids: torch.Tensor, probs: torch.Tensor) -> list[tuple[str, float]]:
        return [(tokenizer.decode([number]), prob) for number, prob in zip(ids.tolist(), probs.tolist(), strict=True)]

    return [
        InspectedToken(
            text=tokenizer.decode([token]),
            id=token,
            entropy=float(readings.base_entropy[t]),
            adapted_entropy=float(readings.adapted_entropy[t]),
            base=spelled(top.base_ids[t], top.base_probs[t]),
            adapted=spelled(top.adapted_ids[t], top.adapted_probs[t]),
            experts=list(zip(readings.experts[t].tolist(), readings.gates[t].tolist(), strict=True)),
            weight=float(readings.weight[t]),
            kl=float(readings.kl[t]),
            bias=float(readings.bias_max[t]),
            flip=bool(readings.flipped[t]),
        )
        for t, token in enumerate(token_ids)
    ]


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
