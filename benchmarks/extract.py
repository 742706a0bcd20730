"""Extraction into a feature store against what it cannot do without, on the same batches: tokens per second.

Arms, each over the same examples in the same batches, completion tokens through the head:

    backbone  the model's forward without its head
    matmul    backbone, and one product of the completions' hidden states with the output embedding
    extract   the whole of `moe-bias extract`: entropy, log Z, R, A, realised logit, a shard on disk

Target: extract at 0.9 of matmul or more; matmul is its limit. Tokens are those of prompts and
completions together. Memory is the peak above the loaded model, in a process of its own, also for
examples four times as long and a quarter as many in a batch: logits are held for a chunk of tokens,
whatever the length.

    uv run python benchmarks/extract.py [--rounds 7] [--examples 32] [--length 192] [--batch-size 16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from memory import peak_in_own_process, print_peak
from moe_bias.backbone import find_head
from moe_bias.chunks import longest_first
from moe_bias.config import ModelConfig
from moe_bias.features.build import Choices, extract, make_plan
from moe_bias.features.extract import chunk_rows, completion_hidden
from moe_bias.features.fingerprint import model_facts
from moe_bias.frozen import load_model
from moe_bias.tasks.conversations import Corpus, Example
from side_by_side import ratio, take_turns, wait, write_record

SUPPORT = 4096
ARMS = ("backbone", "matmul", "extract")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--length", type=int, default=192, help="tokens of the longest example, a third of it prompt")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print_peak(build_arms(options)[options.memory_of])
        return
    rates = take_turns(build_arms(options), options.rounds)
    ratios = {name: ratio(rates, name, "matmul") for name in ARMS}
    peaks = {name: {"short": _peak_of(name, options, 1), "long": _peak_of(name, options, 4)} for name in ARMS}
    print(
        "tokens/s over those of backbone and one matmul; peak MiB above the model, and with examples four times as long"
    )
    for name, value in ratios.items():
        print(f"  {name:<9} {value}  {peaks[name]['short']:8.0f}  {peaks[name]['long']:8.0f}")
    write_record(
        "extract",
        {
            "options": vars(options),
            "rates": rates,
            "ratio_to_matmul": {name: vars(value) for name, value in ratios.items()},
            "peak_mib": peaks,
        },
    )


def examples_of(options: argparse.Namespace) -> list[Example]:
    """Random tokens; lengths from half of `--length` to all of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.length // 2, options.length + 1, (options.examples,), generator=generator)
    rows = [torch.randint(10, SUPPORT, (length,), generator=generator).tolist() for length in lengths.tolist()]
    return [Example(row[: len(row) // 3], row[len(row) // 3 :]) for row in rows]


def build_arms(options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Every arm on the same examples; each returns the tokens that went through the backbone."""
    model, tokenizer = load_model(ModelConfig(model=options.model, device=options.device))
    head = find_head(model)[1]
    examples = examples_of(options)
    tokens = sum(len(example) for example in examples)
    choices = Choices(list(range(SUPPORT)), hidden_dtype=head.dtype, batch_size=options.batch_size)
    plan = make_plan(
        Corpus(examples, list(range(len(examples))), 0), "random", model_facts(model, head, tokenizer), choices
    )

    def hidden_of_batches() -> Iterator[torch.Tensor]:
        for batch in longest_first(examples, options.batch_size):
            yield torch.cat(list(completion_hidden(model, [examples[index] for index in batch])))

    def backbone() -> int:
        for _ in hidden_of_batches():
            wait()
        return tokens

    @torch.inference_mode()
    def matmul() -> int:
        for hidden_TD in hidden_of_batches():
            for hidden_CD in hidden_TD.split(chunk_rows(head)):
                head.module(hidden_CD)
                wait()
        return tokens

    def whole() -> int:
        with TemporaryDirectory() as folder:
            extract(model, head, plan, Path(folder) / "store")
        return tokens

    return {"backbone": backbone, "matmul": matmul, "extract": whole}


def _peak_of(name: str, options: argparse.Namespace, times: int) -> float:
    """Peak MiB of one arm in a process of its own, the examples `times` as long and as many times fewer."""
    words = {
        "memory-of": name,
        "length": options.length * times,
        "examples": max(options.examples // times, 1),
        "batch-size": max(options.batch_size // times, 1),
        "model": options.model,
        "device": options.device,
    }
    return peak_in_own_process(__file__, words).above


if __name__ == "__main__":
    main()
