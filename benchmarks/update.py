"""What one training update costs, per token of the corpus, and how it grows.

Arms, forward, backward and AdamW on the same tokens; from `head-autograd` on on extracted hidden states,
in batches of 512:

    lora              LoRA r = 8 on all linear layers (PEFT), its fastest stock form, through the model
    head-autograd     whole vocabulary, full log-softmax in float32, through autograd: the plain reference
    support-autograd  a support of M columns, the plain formula through autograd
    full              ours, whole vocabulary
    support           ours, M columns, whose base logits every step computes anew
    kept              ours, M columns, base logits kept
    kept-top20        the same on the fifth of the tokens of highest entropy; all tokens count
    default-...       the same four with the layer that the package makes where nothing is chosen; those above
                      are of 16 free experts, of which 2 act
    lora-head         LoRA r = 8 on the output embedding alone, whole vocabulary, through autograd
    lora-head-support the same on M columns, with our reduced softmax, base logits anew
    lora-head-kept    the same, base logits kept
    matmul-full       limit of `full`: the bare product with the whole output embedding, 2 D V a token
    matmul            limit of `support`: the bare product with M columns, 2 D M a token
    pass              limit of `kept`: T x M float32 read once; a fifth of it limits `kept-top20`

Targets over LoRA: full 8x, support 80x, kept 250x, kept-top20 1000x; at most 1.5 times the limit's time.
LoRA's rate does not depend on how many batches follow, so it runs on `--lora-tokens` alone. Peak memory
is each arm's over two batches, and that of one forward of the model on 512 tokens, in processes of their own.

    uv run python benchmarks/update.py [--rounds 7] [--tokens 16384] [--support 4096] [--shape D,V,N]
    uv run python benchmarks/update.py --growth       # seconds per epoch over tokens and support, see growth.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from corpus import Corpus, add_model_options, corpus_of, model_of, random_ids
from growth import TOKENS, measure_growth
from lora_arm import LoRAArm, fastest
from memory import Peak, peak_in_own_process, print_peak
from moe_bias.config import LayerConfig
from moe_bias.mistakes import UserError
from side_by_side import Ratio, ratio, take_turns, wait, write_record
from update_arms import BATCH, LAYER_ARMS, LAYERS, Arm

OURS = {"full": 8, "support": 80, "kept": 250, "kept-top20": 1000}
TARGETS = {**OURS, **{f"default-{name}": target for name, target in OURS.items()}}
_LIMITS = {"full": ("matmul-full", 1.0), "support": ("matmul", 1.0), "kept": ("pass", 1.0), "kept-top20": ("pass", 0.2)}
LIMITS = {**_LIMITS, **{f"default-{name}": limit for name, limit in _LIMITS.items()}}
"""The arm that binds each arm, and the share of that arm's work that does."""
LIMIT_TARGET = 1.5
MEMORY_TOKENS = BATCH
"""Tokens that have hidden states of their own in a process that measures memory; the corpus repeats them."""
FORWARD = "forward"


def main() -> None:
    """Measures and prints."""
    options = parsed()
    if options.memory_of:
        print_peak(work_alone(options))
    elif options.growth is not None:
        measure_growth(options)
    else:
        measure(options)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--lora-tokens", type=int, default=2048)
    parser.add_argument("--support", type=int, default=4096)
    add_model_options(parser)
    parser.add_argument("--growth", type=int, nargs="*", metavar="TOKENS", help=f"default: {TOKENS}")
    parser.add_argument("--budget", type=float, default=4, help="GiB of base logits that growth may keep")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--memory-of", choices=["lora", FORWARD, *LAYER_ARMS], help=argparse.SUPPRESS)
    parser.add_argument("--lora-form", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(options: argparse.Namespace) -> None:
    """All arms in turns, their memory, and the record."""
    model = model_of(options)
    corpus = corpus_of(model, options.tokens)
    check_support(corpus, options.support)
    arms: dict[str, Arm] = {name: build(corpus, options.tokens, options.support) for name, build in LAYER_ARMS.items()}
    lora = LoRAArm(model)
    form, tried = fastest(lora)
    rates = take_turns({"lora": lora.epoch(form, options.lora_tokens), **arms}, options.rounds)
    peaks = {} if options.no_memory else peaks_of(options, lora.forms.index(form))
    over_lora = {name: ratio(rates, name, "lora") for name in LAYER_ARMS}
    of_limit = {name: times_the_limit(rates, name) for name in LIMITS}
    show(rates, over_lora, of_limit, peaks)
    write_record(
        "update",
        {
            "options": vars(options),
            "sizes": {"hidden": corpus.head.hidden_size, "vocabulary": corpus.head.vocab_size, "batch": BATCH},
            "parameters": sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
            "lora": {"form": str(form), "tokens_per_second_of_forms": tried},
            "rates": rates,
            "layers": {name: LayerConfig(**choices).model_dump() for name, choices in LAYERS.items()},
            "trained": {name: trained_by(arm) for name, arm in arms.items() if arm.layer is not None},
            "ratio_to_lora": {name: vars(value) for name, value in over_lora.items()},
            "ratio_to_lora_head": {name: vars(ratio(rates, name, "lora-head")) for name in LAYER_ARMS},
            "ratio_to_free": {name: vars(ratio(rates, f"default-{name}", name)) for name in OURS},
            "time_over_limit": {name: vars(value) for name, value in of_limit.items()},
            "targets": {"ratio_to_lora": TARGETS, "time_over_limit": LIMIT_TARGET},
            "peak_mib": {name: vars(peak) for name, peak in peaks.items()},
        },
    )


def trained_by(arm: Arm) -> int:
    """Numbers that the arm's steps change."""
    assert arm.layer is not None
    return sum(parameter.numel() for parameter in arm.layer.parameters())


def check_support(corpus: Corpus, support: int) -> None:
    """Raises UserError where the support does not fit the vocabulary."""
    if not 1 <= support <= corpus.head.vocab_size:
        raise UserError(f"--support {support} does not fit a vocabulary of {corpus.head.vocab_size} tokens")


def times_the_limit(rates: dict[str, list[float]], name: str) -> Ratio:
    """How many times as long as its limit an arm takes."""
    limit, share = LIMITS[name]
    return ratio({"limit": [rate / share for rate in rates[limit]], name: rates[name]}, "limit", name)


def peaks_of(options: argparse.Namespace, form: int) -> dict[str, Peak]:
    """Peak memory of every arm and of one forward of the model, each in a process of its own."""
    names = ("tokens", "support", "model", "device", "dtype", "shape")
    words = {**{name: getattr(options, name) for name in names}, "lora-form": form}
    return {
        name: peak_in_own_process(__file__, {**words, "memory-of": name}) for name in ("lora", FORWARD, *LAYER_ARMS)
    }


def work_alone(options: argparse.Namespace) -> Callable[[], object]:
    """Two batches of the arm that `--memory-of` names, or one forward; nothing but its own needs is held."""
    model = model_of(options)
    if options.memory_of == FORWARD:
        return forward(model)
    if options.memory_of == "lora":
        lora = LoRAArm(model)
        form = lora.forms[options.lora_form]
        return lora.epoch(form, 2 * form.tokens)
    corpus = corpus_of(model, min(options.tokens, MEMORY_TOKENS))
    return LAYER_ARMS[options.memory_of](corpus, options.tokens, options.support).beginning()


def forward(model: Any) -> Callable[[], object]:
    """One forward of the model on as many tokens as a batch has, logits and all."""
    ids = random_ids(model.config.vocab_size, BATCH).view(4, -1).to(model.device)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, use_cache=False)
        wait()

    return run


def show(
    rates: dict[str, list[float]], over_lora: dict[str, Ratio], of_limit: dict[str, Ratio], peaks: dict[str, Peak]
) -> None:
    """Prints a line an arm, with its targets."""
    print("tokens/s; over LoRA's [target]; time over the limit's [at most 1.5]; peak MiB, above what was held before")
    for name in ("lora", *LAYER_ARMS):
        line = f"  {name:<17}{np.median(rates[name]):12,.0f}"
        line += f"  {over_lora[name]}" if name in over_lora else ""
        line += f"  [{TARGETS[name]}x]  {of_limit[name]}" if name in TARGETS else ""
        print(line + _peak(peaks, name))
    if FORWARD in peaks:
        print(f"  one forward of {BATCH} tokens" + _peak(peaks, FORWARD))


def _peak(peaks: dict[str, Peak], name: str) -> str:
    return f"  {peaks[name].whole:8,.0f} MiB, {peaks[name].above:,.0f}" if name in peaks else ""


if __name__ == "__main__":
    main()
