"""Records of every kind of run, of one model."""

import json
from dataclasses import asdict
from pathlib import Path

from helpers.inspections import ADAPTED, BASE, SCRIPT, inspection_of

RECORDS = Path(__file__).parents[2] / "records"
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}
CHANGE = {"value": 0.125, "low": -0.1, "high": 0.3}
SETTINGS = {"settings": {"model": "bundled", "seed": 0}, "provenance": {"revision": "abc", "versions": {"torch": "2"}}}


def supervised() -> dict:
    return json.loads((RECORDS / "sft" / "gsm8k.json").read_text())


def policy() -> dict:
    accuracy = {"base": ESTIMATE, "start": ESTIMATE, "trained": {"value": 0.625, "low": 0.5, "high": 0.7}}
    position = {"step": 2, "sampled_tokens": 1234, "seconds": 5.0}
    return {"accuracy": accuracy, "change": CHANGE, "right": {"trained": [1.0, 0.0]}, "position": position, **SETTINGS}


def evaluation() -> dict:
    group = {"level": {"1": {"problems": 4, "accuracy": ESTIMATE}, "5": {"problems": 3, "accuracy": CHANGE}}}
    arm = {
        **{"name": "base", "parameters": None, "accuracy": ESTIMATE, "pass_at": {"2": ESTIMATE}, "majority": None},
        **{"tokens": ESTIMATE, "sampled_tokens": 77, "cut": 0.25, "failures": {"unparseable": 0.5}, "groups": group},
        **{"change": {}, "token_share": None},
        "at_limits": [
            {"limit": limit, "accuracy": ESTIMATE, "tokens": limit - 5.0, "change": None} for limit in (40, 80)
        ],
    }
    changed = [{**point, "change": CHANGE} for point in arm["at_limits"]]
    adapted = {**arm, "name": "mine", "parameters": 74_754, "change": {"base": CHANGE}, "at_limits": changed}
    problems = {"name": "amc23", "count": 7, "digest": "d"}
    protocol = {"samples": 2, "temperature": 0.6, "prompt_template": "{question}"}
    return {"problems": problems, "protocol": protocol, "arms": [arm, adapted], "seconds": 3.0, **SETTINGS}


def analysis() -> dict:
    means = dict.fromkeys(
        ("base_entropy", "adapted_entropy", "kl", "weight", "bias_mean", "flipped", "mended", "spoiled"), ESTIMATE
    )
    stratum = {"tokens": 80, "means": {**means, "log_prob_change": {"value": 0.1, "low": None, "high": None}}}
    stratum |= {"bias_max": 3.5, "expert_share": [0.75, 0.25], "expert_entropy": 0.56}
    moment = {"before": f"so {SCRIPT}\n", "token": {"id": 1, "text": SCRIPT}, "base_entropy": 2.5, "kl": 0.75}
    moment |= {"base_choice": {"id": 1, "text": " a"}, "adapted_choice": {"id": 2, "text": " b"}}
    flip = {**moment, "base_continuation": " a wrong way", "adapted_continuation": None}
    expert = {"high": 0.75, "low": 0.25, "from_high": 0.5, "contexts": [moment]}
    expert |= {"raised": [{"id": 1, "text": SCRIPT, "bias": 3.25}], "lowered": [{"id": 2, "text": " to", "bias": -8.5}]}
    moved = {"raised": [{"id": 9, "text": SCRIPT, "bias": 4.5, "acts": False}], "lowered": expert["lowered"]}
    leaning = {"toward": [{"id": 3, "text": " read <b>", "deviations": 5.25}], "away": []}
    linear = {**expert, "expert": 1, "norm": 2.0, "readings": [{"size": 1.25, **moved, **leaning}]}
    adapter = {
        **{"name": "mine", "num_experts": 2, "parameters": 10, "strata": {n: stratum for n in ("all", "high", "low")}},
        **{"histograms": {"base": [1, 5, 0], "adapted": [2, 4, 0]}, "overlap": ESTIMATE},
        "checkpoints": [{"step": step, "overlap": ESTIMATE, "kl": ESTIMATE} for step in (10, 20)],
        "mutual_information": {"stratum": {"nats": 0.02, "at_most": 0.5}},
        "expert_share_by_class": {"digit": [0.5, 0.5]},
        **{"experts": [{**expert, "expert": 0}, linear], "flips": [flip], "answers": None},
    }
    text = {"kind": "store", "name": "gsm8k", "tokens": 160, "rho": 0.2, "threshold": 1.75}
    edges = [0.0, 0.1, 1.0, 10.0]
    return {"format": "moe-bias analysis 2", "text": text, "entropy_edges": edges, "adapters": [adapter], **SETTINGS}


def write(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_runs(folder: Path) -> list[Path]:
    """A run of every kind, all of one model."""
    rl = write(folder / "rl" / "record.json", policy()).parent
    (rl / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "reward": 0.1 * step, "held_out_accuracy": 0.5}) + "\n" for step in range(4))
    )
    sample = {"question": SCRIPT, "completion": "8", "gold": "8", "outcome": "correct", "reward": 1.0}
    (rl / "samples.jsonl").write_text("".join(json.dumps({"step": step, **sample}) + "\n" for step in (1, 2, 2)))
    row = {"name": "lora", "parameters": 200, "seeds": 1, "sampled_tokens": 50, "seconds": 8.0, "peak_bytes": 2**30}
    row |= {"by_seed": [0.5], "gain": {"held out": CHANGE}}
    row |= {"accuracy": {"held out": ESTIMATE}, "change": {"base": CHANGE}}
    arms = [{**row, "name": "moe-bias", "parameters": 20, "seconds": 2.0}, row]
    compared = write(folder / "compared" / "table.json", {"rows": arms}).parent
    part = {"arm": {"name": "lora", "curve": [[0, {"held out": 0.25}], [10, {"held out": 0.5}]]}, **SETTINGS}
    write(compared / "arms" / "lora-seed0.json", part)
    tokens = {"inspection": asdict(inspection_of(BASE, ADAPTED)), **SETTINGS}
    return [
        write(folder / "sft" / "record.json", supervised()).parent,
        rl,
        compared,
        RECORDS / "defaults" / "gsm8k-arms.json",
        RECORDS / "demo" / "products.json",
        write(folder / "measured" / "record.json", evaluation()).parent,
        write(folder / "analysed" / "analysis.json", analysis()).parent,
        RECORDS / "analysis" / "products.json",
        write(folder / "tokens.json", tokens),
    ]
