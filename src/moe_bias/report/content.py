"""What a report is made of, before it is a page: blocks of notes, tables, plots, cards and inspections, by topic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from matplotlib.figure import Figure

from moe_bias.analysis import ExpertView
from moe_bias.analysis.inspection import Inspection
from moe_bias.report.table import Table


class Topic(Enum):
    """What a block is about; the report has one section for each, in this order, with this heading."""

    RESULT = "Result"
    TRAINING = "Training"
    LENGTH = "Accuracy and length"
    ACCURACY = "Where it helps"
    ENTROPY = "Entropy"
    ROUTING = "Routing"
    EXPERTS = "Experts"
    FLIPS = "Flips"
    TOKENS = "Tokens"
    COST = "Cost"
    SETTINGS = "Settings and provenance"


@dataclass(frozen=True)
class Note:
    """A paragraph. The lead is the report's first sentence on a result."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure. `name` is that of its files; `title` says what it shows, also to those who cannot see it."""

    name: str
    title: str
    figure: Figure
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """An expert: facts as words and value, what it says and reads, and where it acts most: texts and the token after
    each.
    """

    expert: int
    facts: Sequence[tuple[str, str]]
    view: ExpertView
    contexts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Cards:
    """The experts of one adapter."""

    name: str
    caption: str
    cards: Sequence[Card]


Part = Note | Table | Plot | Cards | Inspection


@dataclass(frozen=True)
class Block:
    """What one run has to say on a topic."""

    topic: Topic
    run: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Report:
    """All blocks of all runs. `runs` are names with what each is; `model` is the one that they share."""

    title: str
    model: str
    runs: Sequence[tuple[str, str]]
    blocks: Sequence[Block] = field(default_factory=list)

    def sections(self) -> list[tuple[Topic, list[Block]]]:
        """The blocks by topic, in the topics' order; a topic that no run has anything on is left out."""
        found = [(topic, [block for block in self.blocks if block.topic is topic]) for topic in Topic]
        return [(topic, blocks) for topic, blocks in found if blocks]


def slug(run: str, what: str) -> str:
    """The name of a figure's or table's files: the run's with what it shows, in letters that any system takes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{run} {what}".lower()).strip("-")
