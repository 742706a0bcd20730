"""What layers do to the model on a text, token by token, from Python and for `moe-bias analyze`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_bias.adapter.saved import adapter_folder
from moe_bias.analysis.answers import ADAPTED, BASE, Answered
from moe_bias.analysis.entry import adapter_entry, text_record
from moe_bias.analysis.flips import greedy_answered, kept_flips
from moe_bias.analysis.matter import Matter, Options
from moe_bias.analysis.record import FILE, FORMAT
from moe_bias.analysis.tally import ENTROPY_EDGES
from moe_bias.api.arguments import refuse_other_base, refuse_other_layer
from moe_bias.api.data import refuse_other_data
from moe_bias.api.reports import Curve, Report
from moe_bias.backbone import Head
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import SAME_CALL, Interrupted, UserError, as_kind, damaged, read_json, shown
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.report.table import Column, Table
from moe_bias.report.tables import FLIP_IN_SHORT, flips
from moe_bias.rollout.policy import base_policy
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.task import Task
from moe_bias.training.data import Data
from moe_bias.training.problems import TaskData, saved_layer, task_data
from moe_bias.training.run_folder import begin, digest, refuse_other_settings

FOLDER = "adapters"
BASE_ANSWERS = "base-answers.json"


@dataclass(frozen=True, repr=False)
class Flips(Report):
    """Places where the layer changes the choice of token, and how both models go on from there; `str` is a table.

    Of a text those of largest KL. Of answers to a task those that turned, from wrong to right or from right to wrong,
    at the token where both answers part; `turns` then counts all problems (mended, spoiled, both right, both wrong).
    `moments` are as `moe_bias.analysis.record` describes them; `frame()` has the table.
    """

    moments: Sequence[Mapping[str, Any]]
    turns: Mapping[str, int] | None = None
    curve: Curve = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """What they are."""
        if self.turns is not None:
            return f"{self.turns['mended']:,} answers mended and {self.turns['spoiled']:,} spoiled, where they part"
        return f"Places where the choice of token changes, the {len(self.moments):,} of largest KL"

    @property
    def table(self) -> Table:
        """The context, its KL, how both models go on, and of answers both outcomes."""
        return flips(self.moments, "").only(*FLIP_IN_SHORT)


@dataclass(frozen=True, repr=False)
class Analysis(Report):
    """What a layer does to the model on a text, for tokens of high and of low base entropy apart.

    `record` is an adapter's entry of `analysis.json` (`moe_bias.analysis.record` says what is in it).
    """

    record: Mapping[str, Any]
    rho: float
    curve: Curve = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """What was measured; of answers to a task, how many problems are solved too."""
        overlap = self.record["overlap"]["value"]
        solved = ""
        if answers := self.record["answers"]:
            without, with_it = (f"{answers['accuracy'][arm]['value']:.1%}" for arm in (BASE, ADAPTED))
            solved = f"; {without} of the problems are solved without it, {with_it} with it"
        return (
            f"Means over tokens; 'high' are the {self.rho:.0%} of highest base entropy, of which {overlap:.0%} are "
            f"those of the adapted model too{solved}"
        )

    @property
    def experts(self) -> Sequence[Mapping[str, Any]]:
        """A card for each expert: the tokens that it raises and lowers most, what it reads, where it acts."""
        cards: Sequence[Mapping[str, Any]] = self.record["experts"]
        return cards

    @property
    def flips(self) -> Flips:
        """Where the choice of token changes; of answers to a task only where that mended or spoiled one."""
        answers = self.record["answers"]
        return Flips(kept_flips(self.record), None if answers is None else answers["turns"])

    @property
    def table(self) -> Table:
        """Tokens, entropies, KL to the base, share of changed choices and change of log-probability by stratum."""
        strata = self.record["strata"]
        means = {name: {key: mean["value"] for key, mean in strata[name]["means"].items()} for name in strata}
        columns = [
            Column("tokens of entropy", ("stratum",), words=True),
            Column("tokens", ("tokens",), "{:,}"),
            Column("entropy, nats", ("base_entropy",), "{:.3f}"),
            Column("adapted, nats", ("adapted_entropy",), "{:.3f}"),
            Column("KL, nats", ("kl",), "{:.3f}"),
            Column("flipped", ("flipped",), "{:.1%}"),
            Column("log-probability", ("log_prob_change",), "{:+.3f}"),
        ]
        rows = [{"stratum": name, "tokens": strata[name]["tokens"], **means[name]} for name in ("all", "high", "low")]
        return Table("", "", columns, rows)


def analyze(
    base: Frozen,
    layer: MoEBiasLayer,
    data: Data | None = None,
    *,
    task: Task | str | None = None,
    rho: float = 0.2,
    top: int = 8,
    contexts: int = 5,
    flips: int = 20,
    continuation: int = 24,
    max_new_tokens: int = 192,
    train_problems: int = 600,
    test_problems: int = 200,
    seed: int = 0,
    batch_size: int = 16,
) -> Analysis:
    """What the layer does to the held-out answers of the data, for tokens of high and low base entropy apart.

    Or, with a `task` in place of data, to the frozen model's greedy answers, of at most `max_new_tokens`, to
    `test_problems` of it, after the `train_problems` that training with the same `seed` takes; then its own answers are
    compared with them, too. `rho` in (0, 1) is the share of the tokens that are of high entropy. Cards of experts have
    `top` tokens, and `contexts` places where an expert acts most. Kept are `flips` places of largest KL where the
    choice of token changes; where the texts are known both models go on for `continuation` tokens from there.
    `batch_size` prompts go through the model at a time.

    Raises UserError on data of another model, on a task with too few problems, and on values that cannot be.
    """
    refuse_other_base(base)
    refuse_other_layer(layer, base)
    options = Options(rho, top, contexts, flips, continuation, max_new_tokens, batch_size)
    own = copy.deepcopy(layer).eval()
    if task is None:
        refuse_other_data(data, base)
        assert data is not None
        source = data.store.manifest.recipe.source
        matter = Matter.of_store(base, data.store, data.held_out, "data", source, data.corpus)
    else:
        if data is not None:
            raise UserError("`data` and `task` exclude each other; give one")
        ground = _ground(base, make_task(task, {}, small=True), train_problems, test_problems, seed)
        matter = Matter.of_answers(ground, _answers(ground, options), _support(own), batch_size)
    return Analysis(adapter_entry(matter, matter.marks(rho), own, "layer", options), rho)


class Run:
    """Adapters that are read one after the other: each leaves a file in `output`, which `analysis.json` joins.

    Those that are done are not read again. With `checkpoints` there is a series along the run that made an adapter.
    Raises UserError on an adapter that cannot be found, and where the folder holds another analysis.
    """

    def __init__(
        self, adapters: Sequence[str], output: Path, options: Options, made_with: Mapping[str, Any], checkpoints: bool
    ) -> None:
        refuse_other_settings(output, made_with)
        self._names, self._output, self._options, self._made_with = adapters, output, options, made_with
        folders = [adapter_folder(name) for name in adapters]
        self._runs = [folder if checkpoints else None for folder in folders]
        self._paths = [output / FOLDER / f"{number}.json" for number in range(len(adapters))]
        self.layers: list[MoEBiasLayer] = []

    def begin(self, head: Head) -> list[int]:
        """Reads the layers; the folder is this analysis's from then on. Returns the ids that the first one acts on.

        What is extracted for that support is read from its scalars; layers on another one over the whole vocabulary.
        Raises UserError on an adapter that does not fit, and where the folder is of others.
        """
        self.layers = [saved_layer(name, head).layer.eval() for name in self._names]
        named = zip(self._names, self.layers, strict=True)
        contents = {f"adapter {name}": digest(layer.state_dict().values()) for name, layer in named}
        begin(self._output, self._made_with, contents)
        return _support(self.layers[0])

    def of_task(self, ground: TaskData) -> Matter:
        """The frozen model's answers, which the folder keeps, so that a run that is gone on with has them."""
        support, path = self.begin(ground.head), self._output / BASE_ANSWERS
        if path.is_file():
            remedy = "remove it to sample the answers again"
            answers = as_kind(_BaseAnswers, read_json(path, "file", remedy), f"file {str(path)!r}", remedy).answers
        else:
            answers = _answers(ground, self._options)
            write_json(path, asdict(_BaseAnswers(answers)))
        return Matter.of_answers(ground, answers, support, self._options.batch_size)

    def record(self, matter: Matter) -> dict[str, Any]:
        """What `analysis.json` then holds, once all adapters are read. Raises UserError on a text without tokens."""
        marks = matter.marks(self._options.rho)
        for path, name, layer, run in zip(self._paths, self._names, self.layers, self._runs, strict=True):
            if not path.is_file():
                write_json(path, adapter_entry(matter, marks, layer, name, self._options, run))
        record = {
            "kind": RecordKind.ANALYSIS,
            "format": FORMAT,
            "settings": self._made_with,
            "provenance": provenance(),
            "text": text_record(matter, marks),
            "entropy_edges": list(ENTROPY_EDGES),
            "adapters": [_read(path) for path in self._paths],
        }
        write_json(self._output / FILE, record)
        return record

    def so_far(self, interrupt: KeyboardInterrupt) -> Interrupted:
        """What to raise where the run was interrupted."""
        if isinstance(interrupt, Interrupted):
            return interrupt
        count = sum(path.is_file() for path in self._paths)
        return Interrupted(f"{count} of {len(self._paths)} adapters are done; {SAME_CALL} goes on")


@dataclass(frozen=True)
class _BaseAnswers:
    """What the file of the frozen model's answers holds."""

    answers: list[Answered]


def _ground(base: Frozen, task: Task, train_problems: int, test_problems: int, seed: int) -> TaskData:
    """The problems. Raises UserError on counts that cannot be, and where the task has too few."""
    for name, count, least in (("train_problems", train_problems, 0), ("test_problems", test_problems, 1)):
        if count < least:
            raise UserError(f"`{name}` is {count}; give at least {least}")
    return task_data(base, task, task.problems(train_problems + test_problems, seed), train_problems)


def _answers(ground: TaskData, options: Options) -> list[Answered]:
    return greedy_answered(ground, [base_policy], options, "answers of the frozen model")[0]


def _support(layer: MoEBiasLayer) -> list[int]:
    ids: list[int] = layer.support_or_all().tolist()
    return ids


def _read(path: Path) -> dict[str, Any]:
    remedy = "remove it to read the adapter again"
    found = read_json(path, "file", remedy)
    if not isinstance(found, dict):
        raise damaged(f"file {str(path)!r}", f"it holds {shown(found)}", remedy)
    return found
