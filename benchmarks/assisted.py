"""Tokens a second of transformers' assisted generation, with a draft as it is and under adapters.

    uv run python benchmarks/assisted.py --small SMALL --large LARGE --data ROWS.jsonl --adapter NAME=FOLDER ...

Greedy answers of the large model to the prompts of some rows, with the small one as assistant, which writes as many
tokens a pass each time (`--drafts`). Arms take turns at each prompt, in shuffled order, so that what slows the machine
slows all of them; a prompt's time includes the pass over itself. Besides tokens a second, and their ratio to the draft
as it is, passes of the large model are counted, which no machine slows. `alone` is the large model by itself,
on the first prompts alone. On a CPU seconds are those of the processor, so that others who share it do not count: run
it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

import moe_bias as mb
from moe_bias.api.data import Texts
from moe_bias.evaluation.statistics import ratio_of_sums
from moe_bias.tasks.conversations import answer_ends, encode_prompt
from side_by_side import write_record

ALONE, PLAIN = "alone", "plain"


def main() -> None:
    """Generates, prints and keeps the record."""
    options = parsed()
    if options.prompts < 2 or options.alone == 1:
        raise SystemExit("--prompts and --alone must be at least 2, or --alone 0: one has no interval")
    small, large = (mb.load(name, options.device, options.dtype) for name in (options.small, options.large))
    conversations = Texts.of(options.data).conversations[options.skip :][: options.prompts]
    prompts = [encode_prompt(conversation, large.tokenizer) for conversation in conversations]
    assistant = adapted(small, dict(text.split("=", 1) for text in options.adapter))
    ends = answer_ends(large.model, large.tokenizer)
    found: dict[str, list[dict[str, Any]]] = {}
    shuffler = random.Random(0)
    arms = [PLAIN, *assistant.peft_config]
    for number, prompt in enumerate(prompts):
        names = [*arms, ALONE] if number < options.alone else arms
        for name in shuffler.sample(names, len(names)):
            found.setdefault(name, []).append(
                answered(large, assistant, name, prompt, ends, options) | {"prompt": number}
            )
            print(number, name, {key: value for key, value in found[name][-1].items() if key != "tokens"}, flush=True)
    write_record("assisted", record(options, found))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", required=True)
    parser.add_argument("--large", required=True)
    parser.add_argument("--data", required=True, help="rows whose prompts are answered, JSON Lines")
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--skip", type=int, default=0, help="rows to leave out, those that were trained on")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--alone", type=int, default=2, help="prompts that the large model answers alone besides")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args(words)


def adapted(small: mb.Frozen, folders: dict[str, str]) -> Any:
    """The small model with all adapters, by name."""
    (name, folder), *others = folders.items()
    model = PeftModel.from_pretrained(small.model, folder, adapter_name=name)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


@contextmanager
def assisted_by(assistant: Any, name: str) -> Iterator[dict[str, Any]]:
    """What `generate` is told for an arm."""
    if name == ALONE:
        yield {}
    elif name == PLAIN:
        with assistant.disable_adapter():
            yield {"assistant_model": assistant}
    else:
        assistant.set_adapter(name)
        yield {"assistant_model": assistant}


def answered(
    large: mb.Frozen, assistant: Any, name: str, prompt: list[int], ends: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    """A prompt's greedy answer: its tokens, seconds, and passes of the large model."""
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = options.drafts, "constant"
    config.assistant_confidence_threshold = 0
    passes: list[int] = []
    hook = large.head.module.register_forward_hook(lambda *_: passes.append(1))
    input_ids = torch.tensor([prompt], device=large.device)
    clock = time.process_time if large.device.type == "cpu" else time.perf_counter
    started = clock()
    with assisted_by(assistant, name) as told:
        ids = large.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=ends[0],
            **told,
        )
    seconds = clock() - started
    hook.remove()
    return {"tokens": ids[0, len(prompt) :].tolist(), "seconds": seconds, "passes": len(passes)}


def record(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Sums, and ratios to the draft as it is on the same prompts; no path of this machine."""
    rows = []
    for name, answers in found.items():
        plain = [found[PLAIN][answer["prompt"]] for answer in answers]
        counts, others = (np.array([len(one["tokens"]) for one in part], dtype=float) for part in (answers, plain))
        seconds, theirs = (np.array([one["seconds"] for one in part]) for part in (answers, plain))
        passes = np.array([one["passes"] for one in answers], dtype=float)
        rate, pace = counts / seconds, others / theirs
        rows.append(
            {
                "name": name,
                "prompts": len(answers),
                "tokens": int(counts.sum()),
                "tokens_per_second": vars(ratio_of_sums(counts, seconds)),
                "tokens_a_pass": vars(ratio_of_sums(counts, passes)),
                "to_plain": None if name == PLAIN else vars(ratio_of_sums(rate, pace)),
                "same_answer": float(
                    np.mean([a["tokens"] == b["tokens"] for a, b in zip(answers, plain, strict=True)])
                ),
            }
        )
    return {
        "models": {"draft": Path(options.small).stem, "target": Path(options.large).stem},
        "dtype": options.dtype,
        "drafts": options.drafts,
        "max_new_tokens": options.max_new_tokens,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
