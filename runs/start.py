"""The whole method, told once from the beginning to the end, in public calls.

    uv run python runs/start.py             # about ten minutes on two cores
    uv run python runs/start.py --small     # the same steps with small numbers, in about a minute

A frozen model learns to multiply: first from worked answers, then from rewards. What it writes goes to `--output`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import moe_bias as mb


def main() -> None:
    """Reads the options and tells the story."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("start"), help="folder for the two adapters")
    parser.add_argument("--model", default="bundled", help="a Hub id, a folder, or 'bundled'")
    parser.add_argument("--small", action="store_true", help="small numbers: to see that it runs, not what it gains")
    options = parser.parse_args()
    many = (lambda usual, small: small) if options.small else (lambda usual, small: usual)

    # The model is frozen: nothing below changes a weight of it.
    base = mb.load(options.model)

    # A task makes problems from a seed, and checks answers to them. These come with worked answers. What is trained
    # on is among the first 600 of the seed; what is measured on is not.
    task = mb.task("products", max_terms=3)
    worked = task.problems(many(100, 40), seed=0)
    rows = [{"question": problem.question, "answer": problem.worked} for problem in worked]

    # The backbone runs once over each row. What it says of a token is a hidden state, and a few numbers for the
    # tokens of the vocabulary that will have no bias. The rest of supervised training reads these alone.
    data = mb.extract(base, rows, held_out=0.1, support=many("auto:4096", "auto:512"))
    print(data)

    # So these passes over the text take seconds, however large the backbone is.
    supervised, report = mb.train_sft(base, data, mb.SFTConfig(epochs=many(20, 4)))
    print(report)

    # The same question to both: the base is the adapter left out.
    question = task.problems(601, seed=0)[-1].question
    for name, layer in {"base": None, "supervised": supervised}.items():
        print(f"{name}: {mb.generate(base, question, layer, max_new_tokens=48)}")

    # Rewards need no worked answers. A step samples groups of answers, rewards them, and updates on the hidden states
    # that the sampler has kept: sampling takes nearly all of its time. The supervised layer stays as it is: a copy of
    # it is trained. The task's verdict counts most, and a function of our own a little.
    rewarded, report = mb.train_rl(
        base,
        task,
        supervised,
        mb.RLConfig(steps=many(8, 1), prompts=many(48, 4), max_new_tokens=many(128, 24)),
        reward=brief,
        rewards=mb.RewardConfig(verdict_weight=1, reward_weight=0.1),
        test_problems=many(100, 4),
    )
    print(report)

    # All of them answer the same problems, which none was trained on, in one batch over one KV cache.
    policies = {"base": None, "supervised": supervised, "rewarded": rewarded}
    asked = mb.EvalConfig(limit=many(100, 4), max_new_tokens=many(128, 24))
    print(mb.evaluate(base, policies, task, asked))

    # Where and how the layer changes the model, on tokens of high and of low entropy apart.
    print(mb.analyze(base, rewarded, data))

    # An adapter is two small files, which PEFT, this package and vLLM's plugin read.
    for name, layer in {"supervised": supervised, "rewarded": rewarded}.items():
        mb.save(layer, options.output / name, base)
    again = mb.load_layer(options.output / "rewarded", base)
    print(mb.generate(base, question, again, max_new_tokens=48))


def brief(prompt: str, completion: str, gold: str) -> float:
    """A reward of one's own, from 0 to 1: short answers are worth more."""
    return 1 / (1 + len(completion.split()) / 20)


if __name__ == "__main__":
    main()
