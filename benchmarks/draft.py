"""A small model as the draft of a larger one, as it is and under adapters that were trained towards the larger one.

    uv run python benchmarks/draft.py --small SMALL --large LARGE --data ROWS.jsonl [--other NAME=ROWS.jsonl ...]

Arms, all trained on the same hidden states for the same passes over them:

    plain       the small model as it is
    static      one direction for all tokens, without a gate: the same bias everywhere
    moe-bias    the layer that the package makes where nothing is chosen

Measured on held-out rows of `--data` and on the rows of other texts, which nothing is trained on: the expected share of
the draft's tokens that the target accepts and what follows from it (`moe_bias.evaluation.drafts`), with intervals over
answers, and what an update costs. Hidden states are kept in `--features`, where an extraction that was interrupted
goes on. The adapters are saved in `--adapters`, for `benchmarks/assisted.py`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_bias as mb
from moe_bias.adapter import save_layer
from moe_bias.api.drafts import Towards, target_store
from moe_bias.evaluation.drafts import draft_figures, draft_tokens
from moe_bias.layer import MoEBiasLayer
from moe_bias.training.objectives import Distillation
from moe_bias.training.sft import fit, fresh_layer
from side_by_side import write_record

PLAIN = "plain"
ARMS: dict[str, dict[str, Any]] = {
    "static": {"experts": "directions", "num_experts": 1, "top_k": 1, "entropy_gate": False},
    "moe-bias": {},
}


@dataclass(frozen=True)
class Trained:
    """A layer with its parameters, and the processor's seconds that its updates took, of one thread."""

    layer: MoEBiasLayer
    parameters: int
    steps: int
    seconds: float


def main() -> None:
    """Extracts, trains, measures and keeps the record."""
    options = parsed()
    small, large = (mb.load(name, options.device, options.dtype) for name in (options.small, options.large))
    with ExitStack() as stack:
        own = towards(options, small, large, options.data, "data", options.held_out, stack)
        arms = {name: trained(own, options, choices) for name, choices in ARMS.items()}
        for name, arm in arms.items() if options.adapters is not None else ():
            save_layer(arm.layer, options.adapters / name, small.model, own.prepared.fork_coverage)
        texts = {Path(options.data).stem: measured(own, arms)}
        for name, path in (text.split("=", 1) for text in options.other):
            other = towards(options, small, large, path, name, 0.9, stack, own.prepared.train.support.tolist())
            texts[name] = measured(other, arms)
    write_record("draft", record(options, own, arms, texts))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", required=True)
    parser.add_argument("--large", required=True)
    parser.add_argument("--data", required=True, help="rows of prompts and answers, JSON Lines")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=ROWS", help="texts only measured on")
    parser.add_argument("--held-out", type=float, default=0.16)
    parser.add_argument("--support", default="auto:4096")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--features", type=Path, required=True, help="folder of hidden states")
    parser.add_argument("--adapters", type=Path, help="folder that the adapters are saved in")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args(words)


def towards(
    options: argparse.Namespace,
    small: mb.Frozen,
    large: mb.Frozen,
    rows: str,
    name: str,
    held_out: float,
    stack: ExitStack,
    support: list[int] | None = None,
) -> Towards:
    """A text's tokens with the target's, on a support that is given or chosen on its training part."""
    wanted = options.support if support is None else support
    data = mb.extract(small, rows, held_out=held_out, support=wanted, keep=options.features / f"{name}-small")
    store = target_store(large, data, options.features / f"{name}-large", 16, stack)
    return Towards.of(large, data, data.prepared, store)


def trained(own: Towards, options: argparse.Namespace, choices: dict[str, Any]) -> Trained:
    """An arm's layer after the passes; both models' logits on the support are kept in memory."""
    config = mb.DraftConfig(**choices, epochs=options.epochs, logits_budget="6GiB")
    head, prepared = own.data.base.head, own.prepared
    layer = fresh_layer(config, prepared.support, head)
    started = time.process_time()
    report = fit(layer, prepared.train, head, config, "training", objective=Distillation(), target=own.large.head)
    seconds = time.process_time() - started
    return Trained(layer, layer.config.num_parameters(layer.hidden_size, layer.vocab_size), report.steps, seconds)


def measured(text: Towards, arms: dict[str, Trained]) -> dict[str, Any]:
    """Figures of the draft under each arm on a text's held-out answers."""
    head, held_out = text.data.base.head, text.prepared.held_out
    layers = [None, *(arm.layer for arm in arms.values())]
    found = dict(zip([PLAIN, *arms], draft_tokens(layers, held_out, head, text.large.head), strict=True))
    figures = draft_figures(found, held_out.example, text.data.by_unit)
    return {
        "tokens": len(held_out),
        "answers": len(text.data.held_out),
        "support_mass": text.support_mass,
        "rows": [{"name": name, **one.record()} for name, one in figures.items()],
    }


def record(
    options: argparse.Namespace, own: Towards, arms: dict[str, Trained], texts: dict[str, Any]
) -> dict[str, Any]:
    """What is kept: models by their names alone, and no path of this machine."""
    of_arms = {
        name: {"parameters": arm.parameters, "steps": arm.steps, "ms_an_update": 1e3 * arm.seconds / arm.steps}
        for name, arm in arms.items()
    }
    return {
        "models": {"draft": Path(options.small).stem, "target": Path(options.large).stem},
        "dtype": str(own.data.base.head.dtype).removeprefix("torch."),
        "support": len(own.prepared.train.support),
        "epochs": options.epochs,
        "train_tokens": len(own.prepared.train),
        "arms": of_arms,
        "texts": texts,
    }


if __name__ == "__main__":
    main()
