"""The parts of runs/length.sh that are no commands: its plan, a rival by hand, copies at strengths.

uv run python runs/length.py plan|hand|strengths|named ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import moe_bias as mb

HESITATION = ("Let", "Now", "Next", "First", "Then", "Therefore", "Thus", "So", "Wait", "However", "Actually", "To")
"""What answers to word problems begin a sentence with that could be left out."""
BIAS = -2.0
"""Of each such word, in logits, at strength 1."""


def main() -> None:
    """One of the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    planned = parts.add_parser("plan", help="what the experiment samples, and how long that takes")
    planned.add_argument("calibration", type=Path, help="folder of an evaluation of some problems")
    for name in ("train", "samples", "test", "test-samples", "penalties", "steps", "prompts", "group", "lora"):
        planned.add_argument(f"--{name}", type=int, required=True)
    planned.add_argument("--strengths", required=True)
    by_hand = parts.add_parser("hand", help="saves a static bias on words of hesitation")
    copies = parts.add_parser("strengths", help="saves adapters at other strengths and prints the copies' names")
    named = parts.add_parser("named", help="a server's record with the copies' rows named and marked as strengths")
    for part in (by_hand, copies):
        part.add_argument("model")
        part.add_argument("--dtype", default="auto")
    by_hand.add_argument("output", type=Path)
    copies.add_argument("adapters", type=Path)
    copies.add_argument("names", nargs="+")
    copies.add_argument("--strengths", required=True)
    named.add_argument("record", type=Path)
    named.add_argument("output", type=Path)
    options = parser.parse_args()
    {"plan": plan, "hand": hand, "strengths": strengths, "named": rename}[options.part](options)


def plan(options: argparse.Namespace) -> None:
    """Prints tokens and hours of each step, at the speed and the length of the calibration's answers."""
    record = json.loads((options.calibration / "record.json").read_text())
    base = record["arms"][0]
    speed, length = base["sampled_tokens"] / record["seconds"], base["tokens"]["value"]
    print(
        f"{base['sampled_tokens']:,} tokens in {record['seconds']:,.0f} s: {speed:,.0f} a second, the model's loading "
        f"included; {length:,.0f} tokens an answer, {base['accuracy']['value']:.0%} right, {base['cut']:.0%} cut"
    )
    at_strengths, penalties = 2 * len(options.strengths.split(",")), options.penalties
    tested, arms = options.test * options.test_samples, 3 + penalties + options.lora
    answers = {
        f"answer {options.train} training problems {options.samples} times": options.train * options.samples,
        f"{penalties} runs of rewards": penalties * options.steps * options.prompts * options.group,
        f"answer {options.test} test problems: the model twice, {at_strengths} strengths": tested * (2 + at_strengths),
        f"and {arms} adapters as they are": tested * arms,
    }
    total = 0.0
    for what, count in answers.items():
        seconds = count * length / speed
        total += seconds
        print(f"{count:>9,} answers {count * length:>13,.0f} tokens {seconds / 3600:7.2f} h  {what}")
    print(
        f"{sum(answers.values()):>9,} answers {' ' * 20} {total / 3600:7.2f} h  in all, besides training on the right "
        "answers (a forward pass over them, and for LoRA some); shorter answers take less"
    )


def hand(options: argparse.Namespace) -> None:
    """A bias on those of the words that are tokens."""
    base = mb.load(options.model, dtype=options.dtype)
    biases: dict[str | int, float] = {}
    for word in HESITATION:
        try:
            mb.static_bias(base, {word: BIAS})
        except mb.UserError as error:
            print(f"left out: {error}")
        else:
            biases[word] = BIAS
    mb.save(mb.static_bias(base, biases), options.output, base)
    print(f"{BIAS:+g} on {', '.join(map(str, biases))}")


def strengths(options: argparse.Namespace) -> None:
    """Saves copies such as `short-x0.5`, which a server names by themselves; those that are there stay."""
    base: mb.Frozen | None = None
    for name in options.names:
        for strength in options.strengths.split(","):
            copy = f"{name}-x{strength}"
            print(copy)
            if (options.adapters / copy).exists():
                continue
            base = base or mb.load(options.model, dtype=options.dtype)
            layer = mb.load_layer(options.adapters / name, base)
            layer.strength = float(strength)
            mb.save(layer, options.adapters / copy, base)


def rename(options: argparse.Namespace) -> None:
    """`base:short-x0.5` becomes `short x0.5` of strength 0.5, as `eval --strength` has it, `base:short` `short`."""
    record = _renamed(json.loads(options.record.read_text()))
    for arm in record["arms"]:
        if " x" in arm["name"]:
            arm["strength"] = float(arm["name"].rsplit(" x", 1)[1])
    options.output.write_text(json.dumps(record))


def _renamed(value: Any) -> Any:
    """Names of arms, wherever they stand."""
    if isinstance(value, dict):
        return {_name(key): _renamed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part) for part in value]
    return _name(value)


def _name(value: Any) -> Any:
    if not (isinstance(value, str) and value.startswith("base:")):
        return value
    return value.removeprefix("base:").replace("-x", " x")


if __name__ == "__main__":
    main()
