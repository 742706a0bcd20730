"""TRL's trainer on a tiny model and a few texts."""

from pathlib import Path
from typing import Any

import trl
from datasets import Dataset

from helpers.models import tiny_model, word_tokenizer
from moe_bias import MoEBiasConfig
from moe_bias.trl import MoEBiasSFTTrainer

SUPPORT = list(range(2, 40))
CONFIG = MoEBiasConfig(num_experts=3, expert_rank=2, support=SUPPORT)
TEXTS = [
    {"prompt": f"w{5 + n} w{6 + n}", "completion": " ".join(f"w{(7 * n + m) % 30 + 5}" for m in range(2 + n % 3))}
    for n in range(16)
]
PAIRS = [
    {"prompt": text["prompt"], "chosen": text["completion"], "rejected": f"w{20 + number} w9"}
    for number, text in enumerate(TEXTS)
]


def chat_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    return tokenizer


def choices_of(config: Any, folder: Path, **choices: Any) -> Any:
    """Of a run on a CPU whose rate does not fall."""
    given = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return config(str(folder), **{**given, **choices})


def sft(
    folder: Path,
    model: Any = None,
    texts: Any = TEXTS,
    peft_config: Any = CONFIG,
    trainer: Any = MoEBiasSFTTrainer,
    **choices: Any,
) -> Any:
    """A trainer on texts; `more` are its own arguments, all others its config's."""
    more = choices.pop("more", {})
    return trainer(
        tiny_model() if model is None else model,
        choices_of(trl.SFTConfig, folder, **choices),
        train_dataset=Dataset.from_list(texts),
        processing_class=chat_tokenizer(),
        peft_config=peft_config,
        **more,
    )


def train_and_save(folder: Path, choices: dict[str, Any]) -> None:
    """A run of a process of its own."""
    trainer = sft(folder / "run", **choices)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
