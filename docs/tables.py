"""Tables and outputs that the pages show, made from the records: nothing of them is typed by hand.

A page holds `<!-- from records: NAME -->` and `<!-- end -->`; what stands between is made by the
function of that name in `TABLES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import learning_tables

from moe_bias.evaluation.statistics import estimate_of, percent
from moe_bias.report.table import Column, Table
from moe_bias.report.tables import (
    ARM,
    PARAMETERS,
    SEEDS,
    costs_of_arms,
    costs_of_cells,
    likelihoods,
    percents,
    points,
    probes,
    scores,
    solved,
    strata,
    ways,
)
from moe_bias.report.tables import drafts as of_drafts

RECORDS = Path(__file__).parent.parent / "records"
_MARKED = re.compile(r"(<!-- from records: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with everything between the marks made anew."""
    return _MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def demo_tasks() -> str:
    """What the demonstration found on each task, best gain in accuracy first."""
    records = [_read(path) for path in sorted(RECORDS.glob("demo/*.json"))]
    records.sort(key=lambda record: -record["arms"][2]["accuracy"]["value"] + record["arms"][0]["accuracy"]["value"])
    columns = [
        Column("task", ("settings", "task"), "`{}`"),
        Column("base NLL", ("arms", 0, "nll"), "{:.3f}", bare=True),
        Column("static", ("arms", 1, "nll"), "{:.3f}", bare=True),
        Column("moe-bias", ("arms", 2, "nll"), "{:.3f}", bare=True),
        Column("change to static", ("arms", 2, "nll_change"), "{:+.3f}"),
        Column("base accuracy", ("arms", 0, "accuracy"), "{:.0%}"),
        Column("static", ("arms", 1, "accuracy"), "{:.0%}"),
        Column("moe-bias", ("arms", 2, "accuracy"), "{:.0%}"),
        Column("tokens, base", ("arms", 0, "tokens"), "{:.0f}", bare=True),
        Column("moe-bias", ("arms", 2, "tokens"), "{:.0f}", bare=True),
    ]
    return _shown(Table("", "", columns, records))


def demo_output() -> str:
    """What `moe-bias demo` printed."""
    return "```text\n" + (RECORDS / "demo-output.txt").read_text(encoding="utf-8").rstrip() + "\n```\n"


def sweep_products() -> str:
    """Held-out NLL of each cell of the sweep on products, by stratum, with changes against its base cell."""
    return _cells(_read(RECORDS / "sweeps" / "products.json"))


def defaults(stem: str) -> str:
    """A sweep on one of the two texts behind the defaults, or the arms on it."""
    record = _read(RECORDS / "defaults" / f"{stem}.json")
    more = ["tokens trained on", "seconds"] if stem.endswith("-arms") else ["seeds", "spread"]
    return _cells(record, *more) + f"\n{_machine(record)}.\n"


def _cells(record: dict[str, Any], *more: str) -> str:
    base, took = record["base"], costs_of_cells(record["rows"])
    measured = likelihoods(record["rows"], base)
    table = replace(took, columns=[*took.columns, *measured.columns[1:]])
    shown = ["arm", "parameters", "all tokens", f"change to {base}", "high entropy", "low entropy", *more]
    return _shown(table.only(*shown))


def sft() -> str:
    """Held-out NLL before and after a run of `train sft`."""
    record = _read(RECORDS / "sft" / "gsm8k.json")
    found = {name.removesuffix("_nll"): record[name] for name in ("base_nll", "adapted_nll", "change")}
    columns = [Column("held out", (0,)), Column("NLL in nats per token", (1,), "{:.4f}")]
    steps = record["training"]
    return (
        _shown(Table("", "", columns, list(found.items())))
        + f"\nThe layer of step {steps['layer_step']:,} of {steps['steps']:,}; {_machine(record)}.\n"
    )


def evaluation(folder: str) -> str:
    """What `eval` measured of each arm on each set of problems, in the records of a folder."""
    records = [_read(path) for path in sorted(RECORDS.glob(f"{folder}/*.json"))]
    rows = [_of_problems(record, arm) for record in records for arm in record["arms"]]
    more = [
        Column("problems", ("of",)),
        Column("samples", ("samples",)),
        points("to the first, points", "to the first"),
        percents("one of all, %", "one of all"),
    ]
    shown = ["problems", "samples", "arm", "right, %", "to the first, points", "one of all, %", "majority, %"]
    table = scores(rows, more=more).only(*shown, "tokens", "cut, %", "loops, %", "distinct-4, %")
    return _shown(table) + f"\n% with 95% intervals over problems; {_machine(records[0])}.\n"


def _of_problems(record: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """An arm of an evaluation with what it answered, its change to the first arm, and whether one of all was right."""
    problems, samples = record["problems"], record["protocol"]["samples"]
    return arm | {
        "of": f"{problems['count']} of `{Path(problems['name']).stem}`",
        "samples": samples,
        "to the first": arm["change"].get(record["arms"][0]["name"]),
        "one of all": arm["pass_at"].get(str(samples)),
    }


def answers(stem: str) -> str:
    """Right answers of each arm of an evaluation, and their tokens, with the changes to the first arm."""
    record = _read(RECORDS / "experiment" / f"{stem}.json")
    first = record["arms"][0]["name"]
    samples, limit = record["protocol"]["samples"], record["protocol"]["max_new_tokens"]
    change = Column("tokens, to the first", ("changes", "tokens", first), "{:+,.0f}")
    shown = ["arm", "right, %", f"to {first}, points", f"pass@{samples}, %", "tokens", change.heading, "cut, %"]
    how = "greedy answers" if record["protocol"]["temperature"] == 0 else f"{samples} samples of each"
    return (
        _shown(scores(record["arms"], more=[change]).only(*shown))
        + f"\n{record['problems']['count']} problems, {how}, at most {limit:,} tokens; 95% intervals over problems, "
        f"changes paired; {_machine(record)}.\n"
    )


def trained() -> str:
    """Held-out NLL before and after training on each kind of answers."""
    records = {path.stem: _read(path) for path in sorted(RECORDS.glob("experiment/sft/*.json"))}
    rows = [{"name": name, **record} for name, record in records.items()]
    columns = [
        ARM,
        Column("base", ("base_nll",), "{:.3f}"),
        Column("adapted", ("adapted_nll",), "{:.3f}"),
        Column("change", ("change",), "{:+.3f}"),
    ]
    return _shown(Table("", "", columns, rows)) + f"\n{_machine(next(iter(records.values())))}.\n"


def headroom(stem: str) -> str:
    """What `headroom` found on a text, the verdict first."""
    record = _read(RECORDS / "headroom" / f"{stem}.json")
    return f"*{record['verdict']}.*\n\n{_shown(probes(record))}\n{' '.join(record['notes'])} {_machine(record)}.\n"


def headroom_curve(stem: str) -> str:
    """The losses behind a forecast."""
    record = _read(RECORDS / "headroom" / f"{stem}.json")
    rows = [[f"{point['tokens']:,}", f"{point['nll']:.3f}"] for point in record["curve"]]
    return _table(["training tokens", "held-out NLL of the layer"], rows)


def extraction() -> str:
    """Speed of extraction over backbone and one product with the output embedding."""
    record = _latest("extract")
    rows = [[name, _times(ratio)] for name, ratio in record["ratio_to_matmul"].items()]
    return _table(["tokens/s over those of backbone and one matmul", "ratio"], rows) + _where(record)


def rl_update() -> str:
    """A step of reinforcement learning: updating against TRL's, its share of the step, sampler against trainer."""
    record = _latest("rl_update")
    over, gap = record["ratio_to_trl"], record["gap"]
    rows = [
        ["sampled tokens updated on per second, over TRL's GRPO with LoRA, all tokens", _times(over["all"])],
        ["the same, on the 20% of highest entropy", _times(over["top20"])],
        ["share of a step that updating takes, 4 passes, at most", f"{max(record['share_of_step']):.2%}"],
        ["largest difference of a log-probability in training from that in sampling", f"{max(gap['ours']):.1e}"],
        ["the same for TRL's GRPO", f"{gap['trl']:.1e}"],
    ]
    return _table(["a step of reinforcement learning", ""], rows) + _where(record)


def policies(task: str) -> str:
    """Accuracy of the arms of reinforcement learning on one task, and changes against other arms, in %."""
    record = _read(RECORDS / "compare" / task / "table.json")
    table = solved(record["rows"])
    return _shown(replace(table, columns=[ARM, PARAMETERS, *table.columns[1:]])) + f"\n{_machine(record)}.\n"


def policy_variants(task: str) -> str:
    """One arm of reinforcement learning on one task, by the settings in which its runs differ."""
    records = [_read(path) for path in sorted(RECORDS.glob(f"compare/{task}-variant-*/table.json"))]
    different = [
        name
        for name in records[0]["settings"]
        if name != "output" and len({str(one["settings"][name]) for one in records}) > 1
    ]
    rows = []
    for record in records:
        (row,) = [row for row in record["rows"] if row["name"] == "moe-bias"]
        rows.append(row | {"settings": record["settings"]})
    varied = [Column(f"`{name}`", ("settings", name)) for name in different]
    table = solved([row | {"change": {}} for row in rows])
    return _shown(replace(table, columns=[*varied, SEEDS, *table.columns[2:]])) + f"\n{_machine(records[0])}.\n"


def policy_costs(task: str) -> str:
    """What the arms of reinforcement learning took, on one task."""
    record = _read(RECORDS / "compare" / task / "table.json")
    table = costs_of_arms([row for row in record["rows"] if row["seconds"]])
    shown = table.only("arm", "tokens sampled", "seconds", "of it updating", "peak MiB")
    return _shown(shown) + f"\nMeans over seeds; {_machine(record)}.\n"


def labels(stem: str) -> str:
    """Ways to choose among the labels of a set of texts, on a model."""
    record = _read(RECORDS / "labels" / f"{stem}.json")
    table = ways(record["rows"])
    table = replace(table, columns=[replace(table.columns[0], form="`{}`"), *table.columns[1:]])
    shares = ", ".join(f"{label} {share:.0%}" for label, share in zip(record["labels"], record["shares"], strict=True))
    return (
        _shown(table)
        + f"\n{record['texts']:,} texts to measure on ({shares}), prompts of {record['prompt_tokens']:.0f} tokens, "
        f"{record['forward_seconds']:.2f} s of forward pass each; {record['dtype']}; {_machine(record)}.\n"
    )


def labels_summary(model: str) -> str:
    """Texts right with the most labelled ones that all sets were measured with, by set of texts and way."""
    records = {path.stem: _read(path) for path in sorted(RECORDS.glob(f"labels/{model}-*.json"))}
    most = min(max(row["count"] for row in record["rows"]) for record in records.values())
    rows = []
    for stem, record in records.items():
        right = {row["way"]: row["accuracy"] for row in record["rows"] if row["count"] in (0, most)}
        rows.append({"name": stem.removeprefix(f"{model}-"), "count": most, "right": right})
    ways_shown = ("zero-shot", "static", "logistic", "probe", "moe-bias", "lora")
    columns = [ARM, Column("labelled texts", ("count",)), *(percents(f"{way}, %", "right", way) for way in ways_shown)]
    table = replace(Table("", "", columns, rows), columns=[replace(ARM, heading="texts"), *columns[1:]])
    return _shown(table) + "\n95% intervals over texts.\n"


def labels_chosen(stem: str) -> str:
    """What the ways chose in cross-validation."""
    rows = [row for row in _read(RECORDS / "labels" / f"{stem}.json")["rows"] if row["count"]]
    named = ([row["way"], f"{row['count']:,}", "; ".join(map(_choice, row["choices"]))] for row in rows)
    return _table(["way", "labels", "chosen, by seed"], named)


def _choice(choice: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items())


def rl_signal() -> str:
    """What an update on some problems' samples does for these and for other problems, in percentage points."""
    record = _read(RECORDS / "rl" / "signal-products.json")
    shapes = sorted({(row["rho"], row["steps"], row["prompts"]) for row in record["rows"]})
    headings = ["rates", *(f"{steps} x {prompts} problems, rho = {rho:g}" for rho, steps, prompts in shapes)]
    rows: dict[str, list[str]] = {}
    for row in sorted(record["rows"], key=lambda row: (row["rho"], row["steps"], row["prompts"])):
        rows.setdefault(row["update"], [row["update"]]).append(f"{100 * row['own']:+.1f}, {100 * row['others']:+.1f}")
    return _table(headings, rows.values()) + f"\nMeans over {record['options']['seeds']} splits; {_machine(record)}.\n"


def rl_trials() -> str:
    """Two runs of one arm on as many samples, by how a step is made up."""
    records = [_read(path) for path in sorted(RECORDS.glob("rl/trial-*.json"))]
    headings = ["step", "rate of the router", "sampled tokens", "held-out problems solved, after steps"]
    return _table(headings, (_trial_row(record) for record in records)) + f"\n{_machine(records[0])}.\n"


def analysis(stem: str) -> str:
    """What an adapter does to the tokens of high and of low base entropy."""
    record = _read(RECORDS / "analysis" / f"{stem}.json")
    adapter, text = record["adapters"][0], record["text"]
    known = adapter["mutual_information"]
    told = ", ".join(f"{name} {value['nats']:.3f} of at most {value['at_most']:.3f}" for name, value in known.items())
    overlap = percent(estimate_of(adapter["overlap"]))
    return (
        _shown(strata(adapter))
        + f"\n{text['examples']:,} examples; high: base entropy of at least {text['threshold']:.2f} nats. "
        f"Overlap of the top {text['rho']:.0%}: {overlap}%.\n"
        f"Nats that the expert of a routed slot tells of its token: {told}. {_machine(record)}.\n"
    )


def analysis_experts(stem: str) -> str:
    """The experts' cards in short."""
    cards = _read(RECORDS / "analysis" / f"{stem}.json")["adapters"][0]["experts"]
    return _table(
        ["expert", "of high slots", "of low slots", "raises most", "lowers most", "acts most on"],
        (
            [
                str(card["expert"]),
                f"{card['high']:.1%}",
                f"{card['low']:.1%}",
                *(", ".join(_acted_on(card[side])) for side in ("raised", "lowered")),
                ", ".join(_quoted(moment["token"]["text"]) for moment in card["contexts"]),
            ]
            for card in cards
        ),
    )


def _acted_on(tokens: list[dict[str, Any]]) -> list[str]:
    """The first of an expert's tokens on which the adapter has a bias; records of the first version know no others."""
    return [_quoted(token["text"]) for token in tokens if token.get("acts", True)][:4]


def train_step() -> str:
    """Speed of an optimiser step over LoRA's."""
    record = _latest("train_step")
    rows = [[_STEP_ARMS[arm], _times(ratio)] for arm, ratio in record["ratio_to_lora"].items()]
    return _table(["one optimiser step, tokens/s over LoRA's", "ratio"], rows) + _where(record)


def trl_trainers() -> str:
    """Speed of TRL's SFT trainer with our adapter over the stock one with LoRA, a row for each machine."""
    records = map(_read, sorted(RECORDS.glob("benchmarks/trl_trainers-*.json")))
    rows = []
    for machine, record in {_machine(record): record for record in records}.items():
        options, ratios = record["options"], record["ratio_to_lora"]
        model = "SmolLM2-135M" if options["model"] == "bundled" else "a random model of 1.1B"
        texts = f"{options['texts']} x {options['length']}, {options['batch']} a step"
        rows.append([model, texts, _times(ratios["first"]), _times(ratios["later"]), machine])
    headings = ["model", "texts x tokens", "first epoch, over LoRA", "later epochs, over LoRA", "machine"]
    measure = "Median of tokens a second over rounds of `train()`, and its 95% interval; half of each text is learned."
    return _table(headings, rows) + f"\n{measure}\n"


def update() -> str:
    """Rate of an update over LoRA's, over its limit's time, and peak memory."""
    record = _latest("update")
    headings = ["an update", "tokens/s", "over LoRA's rate", "target", "time over its limit's", "peak memory"]
    if "layers" in record:
        headings += ["over LoRA's on the output embedding", "trained parameters"]
    names = list(_UPDATE_ARMS)
    rows = [_update_row(record, name) for name in names if name in record["rates"] or name in record["peak_mib"]]
    return _table(headings, rows) + _where(record) + _update_note(record)


def growth() -> str:
    """Seconds per epoch over tokens and support, as the figure shows them."""
    record = _latest("growth")
    tokens = sorted({cell["tokens"] for cell in record["cells"]})
    lines: dict[tuple[int, str], dict[int, float | None]] = {}
    for cell in record["cells"]:
        lines.setdefault((cell["support"], cell["arm"]), {})[cell["tokens"]] = cell["seconds"]
    rows = [
        [f"{support:,}{' kept' if arm == 'kept' else ''}", *(_seconds(line[count]) for count in tokens)]
        for (support, arm), line in lines.items()
    ]
    budget = record["budget_bytes"] / 2**30
    return (
        _table(["seconds per epoch, by support", *(f"{count:,} tokens" for count in tokens)], rows)
        + f"\nOne epoch each; logits kept up to {budget:g} GiB; {record['hidden_states']}; {_machine(record)}.\n"
    )


def costs() -> str:
    """What the README shows of speed: each part of the work beside what it stands in for."""
    update, through = _latest("update")["ratio_to_lora"], _latest("train_step")["ratio_to_lora"]
    rl, tenants = _latest("rl_update")["ratio_to_trl"], _latest("serving")["results"]
    batch = _latest("decode")["results"][-1]
    plain = batch["ratio_to_bare"]
    rows = [
        ["the first pass over a text: forward pass, and an update", _times(through["a"]), "a step of LoRA"],
        ["every later pass over it, all tokens", _times(update["kept"]), "a step of LoRA"],
        ["the same, the 20% of highest entropy", _times(update["kept-top20"]), "a step of LoRA"],
        ["updating on sampled tokens, these 20%", _times(rl["top20"]), "TRL's GRPO of LoRA"],
        [
            f"generating, {batch['batch']} rows",
            _times(plain["moe-bias M=4096"]),
            f"the plain model (LoRA: {_times(plain['lora r=8'])})",
        ],
        ["64 adapters in one vLLM", _times(tenants["ours 64"]["ratio_to_lora"]), "64 of LoRA"],
    ]
    return _table(["tokens a second", "times as many", "as"], rows) + _where(_latest("update"))


def gains() -> str:
    """What the README shows of quality: problems solved after worked answers and rewards, beside LoRA's."""
    rows = []
    for task in ("products", "gcd", "general-points"):
        ours, before = (_read(RECORDS / "compare" / name / "table.json") for name in (f"{task}-linear", task))
        arms = {row["name"]: row for row in before["rows"]} | {row["name"]: row for row in ours["rows"]}
        shares = [percent(estimate_of(arms[name]["accuracy"]["held out"])) for name in _GAINS]
        rows.append([f"`{task}`", *shares])
    headings = [f"{title}, {_trained(arms[name])}" if name != "base" else title for name, title in _GAINS.items()]
    return (
        _table(["held-out problems solved, %", *headings], rows) + f"\n95% intervals over problems; {_machine(ours)}.\n"
    )


def _trained(row: dict[str, Any]) -> str:
    return f"{row['parameters']:,} parameters"


def drafts() -> str:
    """A draft under each arm on each text, and what training the arms took."""
    record = _latest("draft")
    rows = [
        {**row, **record["arms"].get(row["name"], {}), "text": f"{text}, {found['tokens']:,} tokens"}
        for text, found in record["texts"].items()
        for row in found["rows"]
    ]
    models = record["models"]
    told = (
        f"{models['draft']} as draft of {models['target']}, both in {record['dtype']}; {record['train_tokens']:,} "
        f"tokens to train on, {record['epochs']} passes, a support of {record['support']:,}"
    )
    more = [
        Column("text", ("text",), words=True),
        PARAMETERS,
        Column("ms of a processor an update", ("ms_an_update",), "{:.0f}"),
    ]
    return _shown(of_drafts(rows, more=more)) + f"\n{told}; 95% intervals over answers; {_machine(record)}.\n"


def decode() -> str:
    """Speed and memory of generation over the bare model's."""
    record = _latest("decode")
    names = list(record["results"][0]["ratio_to_bare"])
    headings = ["generation"]
    for result in record["results"]:
        headings += [f"speed, batch {result['batch']}", "peak memory"]
    rows = []
    for name in names:
        row = [name]
        for result in record["results"]:
            row += [_times(result["ratio_to_bare"][name]), f"{result['peak_mib'][name]:,.0f} MiB"]
        rows.append(row)
    return _table(headings, rows) + _where(record)


_SERVER_ARMS = {
    "one": ("one answer by the server, tokens/s", "the library's own decoder"),
    "many": ("eight answers at once, under eight adapters, tokens/s", "the library's own decoder, one answer"),
    "known": ("first token of an answer to a conversation that is known, under another adapter", "nothing known"),
}


def server() -> str:
    """The server on transformers: answers at once, and a conversation that is known."""
    record = _latest("server")
    rows = [[what, _times(record["ratio"][arm]), over] for arm, (what, over) in _SERVER_ARMS.items()]
    options = record["options"]
    load = f"Answers of {options['new_tokens']} tokens; a conversation of {options['prompt_tokens']:,}."
    return _table(["the server on transformers", "times as fast", "as"], rows) + _where(record) + load + "\n"


def learning_pass() -> str:
    """An edited answer read beside the others' next token, and scalars of two answers from one product."""
    record = _latest("learning_pass")
    options, found = record["options"], record["ratio"]
    rows = [
        ["read in the pass of the others' next token", _times(found["together"]), "that token, and a pass of its own"],
        ["the others' next token alone", _times(found["step"]), "that token, and a pass of its own"],
        ["one product for both answers", _times(found["one product"]), "a product for each"],
    ]
    sizes = f"{options['rows']} answers are written, {options['new_tokens']} tokens of the edited one are new."
    return _table(["an edited answer", "times as fast", "as"], rows) + _where(record) + sizes + "\n"


def serving(name: str = "serving") -> str:
    """Many tenants on one model in vLLM: speed over the plain model and over LoRA, and what the cache did."""
    record = _latest(name)
    headings = ["tenants", "tokens/s", "over plain", "first token", "prompt tokens from the cache", "cache"]
    with_lora = any(tenants.startswith("lora") for tenants in record["results"])
    rows = []
    for tenants in sorted(record["results"], key=_by_kind_and_count):
        arm = record["results"][tenants]
        first, found, held = (
            median(turn[key] for turn in arm["turns"]) for key in ("first_token", "hit_rate", "cache_bytes")
        )
        row = [tenants, f"{median(arm['rates']):,.0f}", _times(arm["ratio_to_plain"])]
        row += [f"{first:.1f} s", f"{found:.1%}", f"{held / 2**20:,.0f} MiB"]
        rows.append([*row, _times(arm["ratio_to_lora"]) if "ratio_to_lora" in arm else ""] if with_lora else row)
    options = record["options"]
    load = (
        f"{options['requests']} requests at once, {options['system_tokens']:,} common tokens, answers of "
        f"{options['new_tokens']}; {options['dtype']}; vLLM {record['vllm']}."
    )
    return _table([*headings, "over LoRA"] if with_lora else headings, rows) + _where(record) + load + "\n"


def rollout() -> str:
    """Sampling that keeps what training needs, over transformers' own generation."""
    record = _latest("rollout")
    ends, limit = sorted(record["results"], key=lambda result: not result["ends"])
    headings = ["sampling", "tokens/s", "over `generate`", "tokens/s, all rows to the limit", "over `generate`"]
    rows = []
    for arm in ends["rates"]:
        row = [arm]
        for part in (ends, limit):
            row += [f"{median(part['rates'][arm]):,.0f}", _times(part["ratio_to_generate"][arm])]
        rows.append(row)
    options = record["options"]
    size = f"{options['prompts']} prompts x {options['group']} samples, at most {options['max_new_tokens']} tokens.\n"
    return _table(headings, rows) + _where(record) + size


def _by_kind_and_count(tenants: str) -> tuple[int, int]:
    kind, _, count = tenants.partition(" ")
    return ("plain", "ours", "lora").index(kind), int(count or 0)


def _trial_row(record: dict[str, Any]) -> list[str]:
    settings, arm = record["settings"], record["arm"]
    curve = ", ".join(f"{step}: {sets['held out']:.1%}" for step, sets in arm["curve"])
    made_up = f"{settings['prompts']} problems x {settings['group']} samples"
    return [made_up, f"{settings['router_rate']:g}", f"{arm['sampled_tokens']:,}", curve]


_GAINS = {
    "base": "frozen model",
    "moe-bias": "MoE-Bias",
    "lora": "LoRA",
    "lora-sft": "LoRA on worked answers alone",
}


_STEP_ARMS = {
    "a": "whole vocabulary, through the model",
    "b": "whole vocabulary, on extracted hidden states",
    "c": "support of 4,096, on extracted hidden states",
    "matmul": "(the bare product of hidden states by the support's columns)",
}


_UPDATE_ARMS = {
    "lora": "LoRA",
    "lora-head": "LoRA on the output embedding alone, hidden states stored",
    "lora-head-support": "the same, support of {support:,}",
    "lora-head-kept": "the same, base logits kept",
    "head-autograd": "whole vocabulary, plain autograd",
    "support-autograd": "support of {support:,}, plain autograd",
    "full": "whole vocabulary, {free}",
    "support": "support of {support:,}, {free}",
    "kept": "the same, base logits kept",
    "kept-top20": "the same, on the 20% of highest entropy",
    "default-full": "whole vocabulary, {default}",
    "default-support": "support of {support:,}, {default}",
    "default-kept": "the same, base logits kept",
    "default-kept-top20": "the same, on the 20% of highest entropy",
    "matmul-full": "(the bare product with the output embedding)",
    "matmul": "(the bare product with the support's columns)",
    "pass": "(one read of the kept logits)",
    "forward": "(one forward of the model)",
}


def _update_row(record: dict[str, Any], name: str) -> list[str]:
    rates, over, limit = (record[key].get(name) for key in ("rates", "ratio_to_lora", "time_over_limit"))
    target, peak = record["targets"]["ratio_to_lora"].get(name), record["peak_mib"].get(name)
    kinds = {kind: f"ours, {layer['experts']} experts" for kind, layer in record.get("layers", {}).items()}
    row = [
        _UPDATE_ARMS[name].format(support=record["options"]["support"], **{"free": "ours", **kinds}),
        f"{median(rates):,.0f}" if rates else "",
        _times(over) if over else "",
        f"{target}x" if target else "",
        _times(limit) if limit else "",
        f"{peak['whole']:,.0f} MiB" if peak else "",
    ]
    if "layers" in record:
        over_head, trained = record["ratio_to_lora_head"].get(name), record["trained"].get(name)
        row += [_times(over_head) if over_head else "", f"{trained:,}" if trained else ""]
    return row


def _update_note(record: dict[str, Any]) -> str:
    options, sizes = record["options"], record["sizes"]
    model = "SmolLM2-135M-Instruct" if options["model"] == "bundled" else f"`{options['model']}`"
    if options["shape"] is not None:
        model = f"a random model of {record['parameters']:,} parameters"
    return (
        f"On {model} (hidden size {sizes['hidden']:,}, vocabulary {sizes['vocabulary']:,}), "
        f"{options['tokens']:,} tokens, batches of {sizes['batch']}; "
        f"LoRA in its fastest form tried, {record['lora']['form']}.\n"
        f"{_update_layers(record)}"
        f"Time over the limit's is to be at most {record['targets']['time_over_limit']:g}x. Peak memory is that of a "
        "process of its own, with all that the arm holds.\n"
    )


def _update_layers(record: dict[str, Any]) -> str:
    """What the layers are, and what the default one's steps cost over those of free experts."""
    if "layers" not in record:
        return ""
    free, default = (record["layers"][kind] for kind in ("free", "default"))
    rank = f", rank {default['expert_rank']}" if default["experts"] == "linear" else ""
    return (
        f"Free experts: {free['num_experts']}, of which {free['top_k']} act; {default['experts']} experts, the "
        f"default: {default['num_experts']}, of which {default['top_k']} act{rank}; with kept base logits their rate "
        f"is {_times(record['ratio_to_free']['kept'])} that of free ones.\n"
    )


def _quoted(text: str) -> str:
    """A token's text as code in a table's cell."""
    return f"`{text!r}`".replace("|", "\\|")


def _seconds(value: float | None) -> str:
    return "not kept" if value is None else f"{value:.3g}"


def _times(ratio: dict[str, float]) -> str:
    digits = 3 if ratio["median"] < 3 else 1
    return f"{ratio['median']:.{digits}f}x [{ratio['low']:.{digits}f}, {ratio['high']:.{digits}f}]"


def _where(record: dict[str, Any]) -> str:
    return f"\nMedian over rounds and its 95% interval; {_machine(record)}.\n"


def _machine(record: dict[str, Any]) -> str:
    machine = record["provenance"]["machine"]
    hardware = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    return f"{hardware}; torch {record['provenance']['versions']['torch']}"


def _shown(table: Table) -> str:
    """A record's table; the names of arms are shown as code."""
    columns = [replace(column, form="`{}`") if column is ARM else column for column in table.columns]
    rows = replace(table, columns=columns).cells
    return _table(table.headings, ([cell.strip().replace("|", "\\|") for cell in row] for row in rows))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latest(name: str) -> dict[str, Any]:
    return _read(max(RECORDS.glob(f"benchmarks/{name}-*.json")))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


_LABELLED = [path.stem for path in RECORDS.glob("labels/*.json")]
_COMPARED = [path.parent.name for path in RECORDS.glob("compare/*/table.json")]


def _noted(make: Callable[[], tuple[Table, str]]) -> str:
    table, note = make()
    return f"{_shown(table)}\n{note}\n"


TABLES: dict[str, Callable[[], str]] = {
    "learning": partial(_noted, learning_tables.quality),
    "learning-kinds": partial(_noted, learning_tables.by_kind),
    "learning-load": partial(_noted, learning_tables.load),
    "learning-soak": learning_tables.soak,
    "learning-lasting": learning_tables.lasting,
    "learning-pass": learning_pass,
    **{f"defaults-{path.stem}": partial(defaults, path.stem) for path in RECORDS.glob("defaults/*.json")},
    **{f"compare-{task}": partial(policies, task) for task in _COMPARED},
    **{f"compare-{task}-costs": partial(policy_costs, task) for task in _COMPARED},
    **{f"analysis-{path.stem}": partial(analysis, path.stem) for path in RECORDS.glob("analysis/*.json")},
    **{f"experts-{path.stem}": partial(analysis_experts, path.stem) for path in RECORDS.glob("analysis/*.json")},
    **{f"labels-{stem}": partial(labels, stem) for stem in _LABELLED},
    **{f"labels-{stem}-chosen": partial(labels_chosen, stem) for stem in _LABELLED},
    **{f"headroom-{path.stem}": partial(headroom, path.stem) for path in RECORDS.glob("headroom/*.json")},
    **{f"headroom-{path.stem}-curve": partial(headroom_curve, path.stem) for path in RECORDS.glob("headroom/*.json")},
    **{f"labels-{model}": partial(labels_summary, model) for model in {stem.rpartition("-")[0] for stem in _LABELLED}},
    "costs": costs,
    "gains": gains,
    "compare-products-variants": partial(policy_variants, "products"),
    "decode": decode,
    "drafts": drafts,
    "demo-output": demo_output,
    "demo-tasks": demo_tasks,
    "evaluation": partial(evaluation, "eval"),
    "generation": partial(evaluation, "generation"),
    **{f"answers-{path.stem}": partial(answers, path.stem) for path in RECORDS.glob("experiment/*.json")},
    "answers-trained": trained,
    "extract": extraction,
    "growth": growth,
    "rl-signal": rl_signal,
    "rl-trials": rl_trials,
    "rl-update": rl_update,
    "rollout": rollout,
    "server": server,
    "serving": serving,
    "serving-alone": partial(serving, "serving_alone"),
    "sft-gsm8k": sft,
    "sweep-products": sweep_products,
    "train-step": train_step,
    "trl-trainers": trl_trainers,
    "update": update,
}
