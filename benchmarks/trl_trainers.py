"""TRL's SFT trainer with a MoE-Bias adapter against the stock one with LoRA, on the same texts: tokens per second.

Arms, each `trainer.train()` over the same batches, with all that TRL does besides:

    lora      trl.SFTTrainer, LoRA r = 8 on all linear layers, without gradient checkpointing
    first     MoEBiasSFTTrainer on texts that it sees for the first time: the backbone is run, without gradient
    later     the same in every later epoch: hidden states are there

    uv run python benchmarks/trl_trainers.py [--rounds 5] [--texts 16] [--length 192]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

import moe_bias as mb
from moe_bias.trl import MoEBiasSFTTrainer
from side_by_side import ratio, take_turns, write_record

ARMS = ("first", "later")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=192, help="tokens of a text; the second half is learned")
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = take_turns(build_arms(options, folder), options.rounds)
    ratios = {name: ratio(rates, name, "lora") for name in ARMS}
    print(f"{options.texts} texts of {options.length} tokens, {options.batch} a step; tokens/s over LoRA's")
    for name, value in ratios.items():
        print(f"  {name:<8} {value}")
    write_record(
        "trl_trainers",
        {"options": vars(options), "rates": rates, "ratio_to_lora": {name: vars(r) for name, r in ratios.items()}},
    )


def build_arms(options: argparse.Namespace, folder: str) -> dict[str, Callable[[], int]]:
    """Each trains for one epoch, and returns the tokens of the texts."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = mb.load(options.model, device="cpu").head.vocab_size
    rows_NL = torch.randint(100, vocabulary, (options.texts, options.length), generator=generator).tolist()
    half = options.length // 2
    mask = [0] * half + [1] * (options.length - half)
    texts = Dataset.from_dict({"input_ids": rows_NL, "completion_mask": [mask] * options.texts})
    ours = trainer_of(MoEBiasSFTTrainer, options, folder, texts, 1e-2, None)
    theirs = trainer_of(
        trl.SFTTrainer,
        options,
        folder,
        texts,
        1e-4,
        LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )

    def run(trainer: Any) -> int:
        trainer.train()
        return options.texts * options.length

    def first() -> int:
        ours.states.forget()
        return run(ours)

    def later() -> int:
        return run(ours)

    return {"lora": lambda: run(theirs), "first": first, "later": later}


def trainer_of(kind: Any, options: argparse.Namespace, folder: str, texts: Dataset, rate: float, peft: Any) -> Any:
    """A trainer of one epoch that says nothing."""
    base = mb.load(options.model)
    return kind(
        base.model,
        args=trl.SFTConfig(
            folder,
            num_train_epochs=1,
            learning_rate=rate,
            per_device_train_batch_size=options.batch,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=texts,
        processing_class=base.tokenizer,
        peft_config=peft,
    )


if __name__ == "__main__":
    main()
