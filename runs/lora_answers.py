"""LoRA on answers, as a PEFT adapter: the rival of an adapter that was trained on the same ones.

    uv run python runs/lora_answers.py MODEL ANSWERS OUTPUT --seconds S      or --passes N

ANSWERS is the output folder of `moe-bias eval`, whose right answers are learned, or a file of rows; of either the
examples that `train sft` trains on with the same seed, and none that it holds out. Rank 8 on all linear layers, batches
of 8 answers, a rate that falls linearly to 0 over S seconds or N passes. OUTPUT is a folder that `moe-bias eval
--adapter OUTPUT` measures; lora.json in it says what the training took.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import moe_bias as mb
from moe_bias.experiments.lora import Budget, LoRAChoices, lora_on, train_lora
from moe_bias.records import provenance, whole_folder, write_json


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("answers", type=Path)
    parser.add_argument("output", type=Path)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float)
    budget.add_argument("--passes", type=int)
    parser.add_argument("--take", default="all", help="right answers of a problem: all, shortest or shorter")
    parser.add_argument("--features", type=Path, help="folder of the hidden states that train sft kept of them")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    base = mb.load(options.model, dtype=options.dtype)
    is_evaluation = options.answers.is_dir()
    answers = mb.right_answers(options.answers, samples_take=options.take) if is_evaluation else options.answers
    data = mb.extract(base, answers, seed=options.seed, keep=options.features or True)
    examples, _ = data.examples()
    tokens = sum(len(example.completion_ids) for example in examples)
    spend = Budget(options.seconds, "seconds") if options.seconds else Budget(options.passes * tokens, "tokens")
    choices = LoRAChoices(rate=options.rate)
    with lora_on(base.model, choices.rank, options.seed) as adapted:
        report = train_lora(adapted, examples, choices, spend, options.seed, "LoRA")
        with whole_folder(options.output) as beside:
            adapted.save_pretrained(beside)
            made = {**asdict(report), **asdict(choices), "seed": options.seed, "answers": len(examples)}
            write_json(beside / "lora.json", made | provenance())
    print(f"{report.tokens:,} completion tokens in {report.seconds:,.0f} s, {report.parameters:,} parameters")


if __name__ == "__main__":
    main()
