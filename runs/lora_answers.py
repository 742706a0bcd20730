"""LoRA on answers, as a PEFT adapter: the rival of an adapter that was trained on the same ones.

    uv run python runs/lora_answers.py MODEL ANSWERS OUTPUT --seconds S      or --tokens N

ANSWERS is the output folder of `moe-bias eval`, whose right answers are learned, or a file of rows. Rank 8 on all
linear layers, batches of 8 answers, a rate that falls linearly to 0 over S seconds or N completion tokens. OUTPUT is a
folder that `moe-bias eval --adapter OUTPUT` measures; lora.json in it says what the training took.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import moe_bias as mb
from moe_bias.api.data import Texts
from moe_bias.experiments.lora import Budget, LoRAChoices, lora_on, train_lora
from moe_bias.records import provenance, whole_folder, write_json
from moe_bias.tasks.conversations import encode_all

MAX_TOKENS = 2048


def main() -> None:
    """Trains and saves."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("answers", type=Path)
    options.add_argument("output", type=Path)
    budget = options.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float)
    budget.add_argument("--tokens", type=int)
    options.add_argument("--rate", type=float, default=2e-4)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()

    texts = mb.right_answers(chosen.answers).texts if chosen.answers.is_dir() else Texts.of(chosen.answers)
    base = mb.load(chosen.model)
    examples = encode_all(texts.conversations, base.tokenizer, MAX_TOKENS).examples
    spend = Budget(chosen.seconds, "seconds") if chosen.tokens is None else Budget(chosen.tokens, "tokens")
    choices = LoRAChoices(rate=chosen.rate)
    with lora_on(base.model, choices.rank, chosen.seed) as adapted:
        report = train_lora(adapted, examples, choices, spend, chosen.seed, "LoRA")
        with whole_folder(chosen.output) as beside:
            adapted.save_pretrained(beside)
            made = {**asdict(report), **asdict(choices), "seed": chosen.seed, "answers": len(examples)}
            write_json(beside / "lora.json", made | provenance())
    print(f"{report.tokens:,} completion tokens in {report.seconds:,.0f} s, {report.parameters:,} parameters")


if __name__ == "__main__":
    main()
