"""`moe-bias eval`: a model and its adapters on the same problems, with intervals, and every sample kept.

Samples are added to `samples.jsonl` problem by problem, and a run that was cut short goes on with the
problems that are missing. `record.json` is written when all are there. `problems.jsonl` marks which problems
were used, with their prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_bias.commands.demo_report import report_console
from moe_bias.commands.eval_arms import EvalArm, arms_of, instructed_arm, refuse_changed_arms
from moe_bias.commands.eval_model import answer_by_model, refuse_unspreadable
from moe_bias.commands.eval_table import print_scores
from moe_bias.commands.looking_settings import EvalSettings
from moe_bias.evaluation.ledger import Ledger
from moe_bias.evaluation.samples import INSTRUCTED, RECORD_FILE, SampleFile, write_prompts
from moe_bias.evaluation.scores import GROUPS, Score, scores
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.progress import meter, say
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.rollout.endpoint import Endpoint, EndpointChoices, EndpointError
from moe_bias.tasks.benchmarks import ProblemSet, Protocol, problem_set, protocol_of
from moe_bias.tasks.task import of_bad_golds
from moe_bias.training.run_folder import begin, refuse_other_settings

_DECIDING = {
    *("model", "dtype", "endpoint", "benchmark", "data", "split", "question_column"),
    *("task", "task_options", "easy", "train_problems", "limit"),
}
"""Settings that decide an arm's samples, besides the protocol."""


def run(settings: EvalSettings) -> None:
    """Answers what is missing, or grades all again; prints the scores and writes the record.

    Raises UserError on settings, problems and adapters that cannot be used, where the folder holds
    samples of other ones, and where a server stops answering; Interrupted on Ctrl-C.
    """
    protocol = protocol_of(settings)
    deciding = settings.model_dump(mode="json", include=_DECIDING) | asdict(protocol)
    refuse_other_settings(settings.output, deciding)
    problems, arms = problem_set(settings), _arms(settings)
    refuse_unspreadable(settings, arms)
    ledger = Ledger(problems, [arm.name for arm in arms], SampleFile(settings.output, protocol.samples))
    if settings.regrade:
        ledger.check_whole()
    begin(settings.output, deciding, {"problems": problems.digest()})
    refuse_changed_arms(settings.output, arms)
    asked = zip(problems.ids, problems.problems, strict=True)
    write_prompts(settings.output, {name: protocol.prompt(problem) for name, problem in asked})
    started = time.perf_counter()
    if settings.regrade:
        ledger.regrade()
    else:
        _answer(settings, protocol, arms, ledger)
    seconds = time.perf_counter() - started
    found = scores(ledger.file.read(), ledger.arms, _groups(problems), problems.ids)
    record = _record(settings, protocol, problems, arms, found, seconds)
    write_json(settings.output / RECORD_FILE, record)
    console = report_console()
    print_scores(console, record)
    if settings.instruction:
        say(console, f"{INSTRUCTED} is the model without an adapter, told below each prompt: {settings.instruction}")
    unread = {sample.problem for sample in ledger.file.read() if sample.outcome == "bad gold"}
    if unread:
        named = of_bad_golds([name for name in problems.ids if name in unread], len(problems.ids))
        say(console, f"{named}; mend them and give --regrade, or leave them out.")
    console.print(f"Samples and {RECORD_FILE} are in {settings.output}.", highlight=False, soft_wrap=True)


def _arms(settings: EvalSettings) -> list[EvalArm]:
    if not settings.endpoint:
        return arms_of(settings.adapter, settings.base, settings.strength, settings.instruction)
    if settings.instruction and INSTRUCTED in settings.endpoint_model:
        raise UserError(f"--endpoint-model names {INSTRUCTED!r}, which is the row of --instruction; leave one out")
    return [*map(EvalArm, settings.endpoint_model), *instructed_arm(settings.instruction)]


def _answer(settings: EvalSettings, protocol: Protocol, arms: Sequence[EvalArm], ledger: Ledger) -> None:
    try:
        if settings.endpoint:
            _answer_by_endpoint(settings, protocol, arms, ledger)
        else:
            answer_by_model(settings, protocol, arms, ledger)
    except EndpointError as error:
        raise UserError(f"{error}; {ledger.kept()}") from error
    except KeyboardInterrupt as interrupt:
        raise Interrupted(ledger.kept()) from interrupt


def _answer_by_endpoint(settings: EvalSettings, protocol: Protocol, arms: Sequence[EvalArm], ledger: Ledger) -> None:
    choices = EndpointChoices(
        protocol.samples,
        protocol.temperature,
        protocol.top_p,
        protocol.max_new_tokens,
        protocol.chat,
        settings.batch_size,
        settings.endpoint_timeout,
        settings.endpoint_retries,
    )
    told = {arm.name: arm.instruction for arm in arms}
    for name, numbers in ledger.missing().items():
        asked = {number: ledger.problems.problems[number] for number in numbers}
        prompts = {number: protocol.prompt(problem, told[name]) for number, problem in asked.items()}
        seeds = {number: protocol.seed_of(problem) for number, problem in asked.items()}
        endpoint = Endpoint(settings.endpoint, settings.endpoint_model[0] if told[name] else name, choices)
        with meter(name, len(numbers) * protocol.samples, "answers") as bar:
            for number, answers in endpoint.answers(prompts, seeds):
                ledger.keep(number, {name: answers})
                bar.advance(len(answers))


def _groups(problems: ProblemSet) -> dict[str, dict[str, list[str]]]:
    """The ids of the problems by column and value."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, problem in zip(problems.ids, problems.problems, strict=True):
        for column in GROUPS:
            if problem.entry.get(column) is not None:
                found.setdefault(column, {}).setdefault(str(problem.entry[column]), []).append(name)
    return found


def _record(
    settings: EvalSettings,
    protocol: Protocol,
    problems: ProblemSet,
    arms: Sequence[EvalArm],
    found: Sequence[Score],
    seconds: float,
) -> dict[str, Any]:
    """`seconds` are those of this call: what was answered before is not in them."""
    return {
        "kind": RecordKind.EVALUATION,
        "problems": {"name": problems.name, "count": len(problems.problems), "digest": problems.digest()},
        "protocol": asdict(protocol),
        "arms": [{**asdict(arm), **asdict(score)} for arm, score in zip(arms, found, strict=True)],
        "settings": settings.model_dump(mode="json"),
        "seconds": seconds,
        "provenance": provenance(),
    }
