"""`moe-bias compare --dry-run`: what each arm would hold and do, those that have a record left out, and the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

from rich import box
from rich.console import Console
from rich.table import Table

from moe_bias.commands.compare import shifted_of
from moe_bias.commands.dry_subject import UNKNOWN_PROMPT, Subject, say_model, say_untried
from moe_bias.commands.training_settings import CompareSettings
from moe_bias.commands.trial import LoRARate, SamplingRate, forward_rate, lora_rate, sampling_rate, training_rate
from moe_bias.experiments.arm import ArmRecords
from moe_bias.experiments.grpo_trainer import check_trl
from moe_bias.experiments.policy_arms import (
    BASE,
    LAYER_ARMS,
    LORA,
    LORA_ARMS,
    LORA_HIGH_ENTROPY,
    LORA_SUPERVISED,
    SUPERVISED,
    PolicyArm,
    chosen_arms,
)
from moe_bias.experiments.policy_budgets import (
    Grounds,
    Work,
    base_held,
    layer_budget,
    layer_held,
    layer_refusal,
    lora_refusal,
    shared_work,
    work_of,
)
from moe_bias.experiments.rewarded import Shifted, refuse_uneven_lora, refuse_unfit_problems
from moe_bias.experiments.warm_start import warm_settings, worked_examples
from moe_bias.limits import in_bytes, in_time
from moe_bias.mistakes import UserError
from moe_bias.progress import say
from moe_bias.records import RecordKind
from moe_bias.tasks.conversations import Example, ask, encode_prompt
from moe_bias.tasks.task import Problem
from moe_bias.training.budget import Held, LoRABudget, PolicyBudget, Text, beyond_memory, layer_of, memories, peak
from moe_bias.training.problems import TaskData, rewards_of, task_data, task_of
from moe_bias.training.run_folder import refuse_other_settings


def compare(console: Console, settings: CompareSettings) -> None:
    """Prints it all. Raises UserError on what the run would refuse before it loads the model."""
    names = chosen_arms(settings.arms)
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    rewards_of(settings).check_limit(settings.max_new_tokens)
    refuse_uneven_lora(names, settings)
    task, shifted = task_of(settings), shifted_of(settings)
    problems = task.problems(settings.train_problems + settings.test_problems, seed=0)
    refuse_unfit_problems(task, problems[: settings.train_problems], settings, names)
    missing = _missing(settings, names)
    subject = Subject.of(settings)
    data = None if subject.base is None else task_data(subject.base, task, problems, settings.train_problems)
    rates = None if data is None or not any(missing.values()) else Rates.of(data, settings, missing)
    plan = Plan(settings, subject, _grounds(settings, data, shifted), missing, rates)
    say_model(console, subject, None)
    plan.say_steps(console)
    if not any(missing.values()):
        say(console, f"All arms have their records in {settings.output}: nothing would be run.")
        return
    plan.say_held(console)
    plan.say_refusals(console)
    _say_rates(console, subject, rates, any(missing.get(name) for name in LORA_ARMS))
    plan.say_work(console)


@dataclass(frozen=True)
class Rates:
    """Tokens a second: of answers, through the frozen model, of a layer's training, and under LoRA where tried."""

    sampling: SamplingRate
    forward: float
    training: float
    lora: LoRARate | None

    @classmethod
    def of(cls, data: TaskData, settings: CompareSettings, missing: Mapping[str, Sequence[int]]) -> Rates:
        """A second or so of each."""
        layer = layer_of(settings, data.head.vocab_size)
        examples = [Example(prompt, prompt) for prompt in data.train.prompts]
        has_lora = any(missing.get(name) for name in LORA_ARMS)
        return cls(
            sampling_rate(data, settings, layer),
            forward_rate(data.base, examples),
            training_rate(data.base, examples, warm_settings(settings), layer),
            lora_rate(data.base, examples, settings) if has_lora else None,
        )

    def seconds(self, work: Work) -> float:
        """What the work takes."""
        updating = 0.0 if self.lora is None else work.updated / self.lora.tokens
        answers = (work.sampled + work.measured) / self.sampling.answers
        return answers + work.forward / self.forward + work.trained / self.training + updating


@dataclass(frozen=True)
class Plan:
    """What is to be run, by arm the seeds that have no record yet, and on what."""

    settings: CompareSettings
    subject: Subject
    grounds: Grounds
    missing: Mapping[str, Sequence[int]]
    rates: Rates | None

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, seeds in self.missing.items() if seeds]

    @cached_property
    def _layers(self) -> dict[str, PolicyBudget]:
        sizes = self.grounds.prompt_tokens, self.grounds.train, self.grounds.test
        found = (name for name in self.missing if name in LAYER_ARMS)
        return {name: layer_budget(name, self.subject.size, self.settings, *sizes) for name in found}

    @cached_property
    def _lora(self) -> dict[str, LoRABudget]:
        lora = None if self.rates is None else self.rates.lora
        warm = bool(self.settings.warm_problems)
        return {
            name: LoRABudget(
                self.subject.size,
                self.settings,
                self.grounds.prompt_tokens,
                self.grounds.worked_tokens if warm or name == LORA_SUPERVISED else 0,
                self.grounds.test,
                name != LORA_SUPERVISED,
                None if lora is None else lora.token_bytes,
            )
            for name in self.missing
            if name in LORA_ARMS
        }

    @cached_property
    def _held(self) -> dict[str, list[Held]]:
        held = {}
        for name in self._names:
            if name in self._layers:
                held[name] = list(layer_held(self._layers[name], self.grounds, name != SUPERVISED))
            elif name in self._lora:
                held[name] = list(self._lora[name].held())
            else:
                held[name] = list(base_held(self.subject.size, self.settings, self.grounds))
        return held

    def _trainable(self, name: str) -> int:
        if name in self._lora:
            return self._lora[name].parameters
        size = self.subject.size
        return self._layers[name].layer.num_parameters(size.hidden_size, size.vocab_size)

    def say_steps(self, console: Console) -> None:
        """What a step is, and how long prompts are."""
        settings, known = self.settings, self.subject.base is not None
        tokens = settings.prompts * settings.group * settings.max_new_tokens
        say(
            console,
            f"A step of an arm by rewards samples up to {tokens:,} tokens, "
            f"{settings.prompts:,} problems x {settings.group:,} answers x {settings.max_new_tokens:,}; "
            f"{settings.steps:,} steps. The longest prompt {'has' if known else 'is taken to have'} "
            f"{self.grounds.prompt_tokens:,} tokens.",
        )

    def say_held(self, console: Console) -> None:
        """One thing after the other, with the arms that hold it; below, how much each arm holds at one time."""
        table = Table("holds at least", "bytes", "where", "while", "arms", box=box.SIMPLE_HEAD)
        table.columns[1].justify, table.columns[4].overflow = "right", "fold"
        device, rows = self.subject.device, dict[tuple[str, str, str, str], list[str]]()
        for name, held in self._held.items():
            for one in held:
                if one.bytes:
                    place = device.type if one.place == "device" else one.place
                    phase = "" if one.phase == "always" else one.phase
                    rows.setdefault((one.what, in_bytes(one.bytes), place, phase), []).append(name)
        for row, names in sorted(rows.items(), key=lambda item: list(self._names).index(item[1][0])):
            table.add_row(*row, "all" if names == self._names else ", ".join(names))
        console.print(table)
        trainable = [f"{name} {self._trainable(name):,}" for name in self._names if name != BASE]
        if trainable:
            say(console, f"Trainable parameters: {', '.join(trainable)}.")
        for memory in memories(device):
            there = "" if memory.bytes is None else f" of {in_bytes(memory.bytes)}"
            parts = [f"{name} {in_bytes(peak(held, memory.places))}" for name, held in self._held.items()]
            say(console, f"At one time in {memory.name}{there}: {', '.join(parts)}.")

    def say_refusals(self, console: Console) -> None:
        """What would end the run, and what does not fit."""
        if {LORA, LORA_HIGH_ENTROPY} & set(self._names):
            try:
                check_trl()
            except UserError as error:
                say(console, f"The run would be refused: {error}.")
        for name, held in self._held.items():
            beyond = beyond_memory(held, self.subject.device)
            refusal = layer_refusal(self._layers[name]) if name in self._layers and name != SUPERVISED else None
            if beyond and name in self._lora:
                refusal = lora_refusal(name, beyond)
            elif beyond:
                say(console, f"{name} would hold {beyond}, which does not fit.")
            if refusal:
                say(console, f"The run would be refused: {refusal}.")

    def say_work(self, console: Console) -> None:
        """By arm, and what they share."""
        table = Table("at most", "to run", "samples", "tokens", "LoRA's tokens", box=box.SIMPLE_HEAD, pad_edge=False)
        if self.rates is not None:
            table.add_column("time")
        for column in table.columns:
            column.overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        works = list[Work]()

        def row(name: str, count: str, work: Work) -> None:
            numbers = (f"{number:,}" for number in (work.samples, work.sampled + work.measured, work.updated))
            table.add_row(name, count, *numbers, *([in_time(self.rates.seconds(work))] if self.rates else []))

        seeds = {seed for name in LORA_ARMS for seed in self.missing.get(name, ())}
        counts = {name: len(runs) for name, runs in self.missing.items()}
        for name, work in shared_work(counts, len(seeds), self.settings, self.grounds).items():
            works.append(work)
            row(name, "", work)
        for name, count in counts.items():
            works.append(work_of(name, self.settings, self.grounds).times(count))
            row(name, f"{count} of {1 if name == BASE else len(self.settings.seeds)}", works[-1])
        table.add_section()
        row("sum", f"{sum(counts.values())}", reduce(add, works))
        console.print(table)
        say(
            console,
            "Tokens are those of samples and of greedy answers before, between and after; LoRA's go forward and back "
            "through the model, prompts counted.",
        )
        done = [name for name, count in counts.items() if not count]
        if done:
            say(console, f"{' and '.join(done)} cost nothing: their records are in {self.settings.output}.")


def _missing(settings: CompareSettings, names: Sequence[str]) -> dict[str, list[int]]:
    records = ArmRecords(settings.output, RecordKind.ARMS, PolicyArm)
    return {
        name: [seed for seed in ([0] if name == BASE else settings.seeds) if records.load(name, seed) is None]
        for name in names
    }


def _grounds(settings: CompareSettings, data: TaskData | None, shifted: Shifted | None) -> Grounds:
    """Sizes of the problems; where there is no tokenizer to tell, prompts and worked answers are taken to be long."""
    sets, train, test = 1 if shifted is None else 2, settings.train_problems, settings.test_problems
    warm = min(settings.warm_problems, train)
    if data is None:
        whole, first, others = (Text(n * UNKNOWN_PROMPT, 2 * n * UNKNOWN_PROMPT) for n in (train, warm, test))
        return Grounds(train, test, sets, UNKNOWN_PROMPT, whole, first, others, 2 * UNKNOWN_PROMPT)
    away = [] if shifted is None else [encode_prompt(ask(one.question), data.tokenizer) for one in shifted[1]]
    longest = max(map(len, [*data.train.prompts, *data.test.prompts, *away]))
    answers, to_measure = _worked(data, data.train.problems), _worked(data, data.test.problems)
    texts = _text(answers), _text(_worked(data, data.train.problems[:warm])), _text(to_measure)
    return Grounds(train, test, sets, longest, *texts, max(map(len, answers), default=0))


def _worked(data: TaskData, problems: Sequence[Problem]) -> list[Example]:
    """Worked answers, none of problems that have none: an arm that would need them has been refused."""
    return worked_examples(data, [problem for problem in problems if problem.worked])


def _text(examples: Sequence[Example]) -> Text:
    return Text(sum(len(example.completion_ids) for example in examples), sum(map(len, examples)))


def _say_rates(console: Console, subject: Subject, rates: Rates | None, has_lora: bool) -> None:
    if rates is None:
        say_untried(console, subject)
        return
    say(
        console,
        f"{rates.sampling.answers:,.0f} tokens a second were sampled, in {rates.sampling.rows:,} rows; "
        f"{rates.forward:,.0f} went through the model, and {rates.training:,.0f} through training of a layer by "
        "supervised learning. Estimates: every answer is as long as it may be, a run's rows are as fast, though more "
        "are mostly faster, updates by rewards are as fast as supervised ones, and rewards take no time.",
    )
    if rates.lora is not None:
        say(
            console,
            f"{rates.lora.tokens:,.0f} tokens a second went forward and back through the model under LoRA, in a batch "
            f"of {rates.lora.rows:,} x {rates.lora.length:,} tokens, which kept {in_bytes(rates.lora.token_bytes)} of "
            "states a token. Estimates: larger batches are as fast, and answers under LoRA as the frozen model's, "
            "which they hardly are.",
        )
    elif has_lora:
        say(console, "LoRA was not tried.")
