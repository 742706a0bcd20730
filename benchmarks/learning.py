"""What an adapter learns from its users' corrections, one after the other, beside what else could be done with them.

Tenants are simulated. Each has a way of its own that the model cannot know: a form of answer, labels of its own, names,
a unit, a register. At every interaction a tenant asks something new, and corrects the answer to what it wanted. An arm
is tested before it learns: the likelihood of the wanted answer, and whether greedy decoding gives it to the letter.

    base       the frozen model
    static     one direction in the space of the output embedding, no router: learned as ours
    ours       the layer that `serve --learn` learns with, by the same code
    prompt     the last corrections in the prompt, as turns of the conversation
    lora       LoRA of rank 8 on all linear layers, updated by the same corrections and as many replayed ones

Writes a record; rates of static, ours and lora are chosen on tenants of their own, which are not measured.

    python benchmarks/learning.py --output records/learning/smollm2-135m.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

import moe_bias as mb
from moe_bias.backbone import adapted_logits, hidden_states
from moe_bias.config import LayerConfig, LearnConfig
from moe_bias.features.extract import Features, answer_features
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.learning.fresh import fresh_layer
from moe_bias.learning.journal import Entry
from moe_bias.learning.learner import LESSON, Learner
from moe_bias.learning.lessons import pair_lesson
from moe_bias.mistakes import UserError
from moe_bias.records import provenance, write_json
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import layer_policy
from moe_bias.tasks.conversations import Conversation, answer_ends, encode_prompt

RATES = {"static": (3e-3, 1e-2, 3e-2), "ours": (3e-3, 1e-2, 3e-2), "lora": (3e-4, 1e-3, 3e-3)}
PASSES, REPLAY, SHOWN = 4, 4, 4
"""Steps on a correction, earlier ones learned again with it, and corrections that a prompt shows."""
LONGEST = 40

COUNTRIES = dict(
    France="Paris", Spain="Madrid", Italy="Rome", Germany="Berlin", Poland="Warsaw", Norway="Oslo", Sweden="Stockholm",
    Greece="Athens", Egypt="Cairo", Japan="Tokyo", China="Beijing", India="New Delhi", Russia="Moscow", Turkey="Ankara",
    Canada="Ottawa", Mexico="Mexico City", Cuba="Havana", Peru="Lima", Chile="Santiago", Kenya="Nairobi",
    Austria="Vienna", Hungary="Budapest", Portugal="Lisbon", Ireland="Dublin", Finland="Helsinki", Denmark="Copenhagen",
    Belgium="Brussels", Iran="Tehran", Iraq="Baghdad", Thailand="Bangkok",
)  # fmt: skip
GOOD = ("wonderful", "great", "excellent", "lovely", "superb", "fantastic")
BAD = ("awful", "terrible", "boring", "broken", "rude", "disappointing")
THINGS = ("The hotel", "This film", "The meal", "My new phone", "The concert", "Their service")
PROBLEMS = {
    "I cannot log in": "the account", "my invoice is wrong": "the billing", "I want to cancel": "the contract",
    "the page does not load": "the network", "I lost my password": "the account", "I was charged twice": "the billing",
    "when does my plan end": "the contract", "the video stutters": "the network", "change my user name": "the account",
    "I need a receipt": "the billing", "I want to extend my plan": "the contract", "no connection": "the network",
}  # fmt: skip
NAMES = ("Zephyr", "Orbit", "Maple", "Falcon", "Indigo", "Pixel", "Nimbus", "Cobalt")
LABELS = (("yes", "no"), ("green", "red"), ("keep", "drop"), ("A", "B"), ("high", "low"), ("sun", "rain"))
UNITS = ("miles", "leagues", "steps", "yards", "blocks", "stadia")


@dataclass(frozen=True)
class Asked:
    """A question, and the answer that its tenant wants."""

    question: str
    wanted: str


def form(rng: random.Random) -> list[Asked]:
    """Answers between an opening and a closing of the tenant's own."""
    opening, closing = rng.choice(("Answer:", "Result =", ">>", "Final:")), rng.choice((".", " !", " #", " (end)"))
    return [Asked(f"What is the capital of {c}?", f"{opening} {city}{closing}") for c, city in COUNTRIES.items()]


def labels(rng: random.Random) -> list[Asked]:
    """Reviews, good or bad, by the tenant's own labels."""
    good, bad = rng.choice(LABELS)
    if rng.random() < 0.5:
        good, bad = bad, good
    texts = [(f"{thing} was {word}.", good) for thing in THINGS for word in GOOD]
    texts += [(f"{thing} was {word}.", bad) for thing in THINGS for word in BAD]
    return [Asked(f"Classify: {text}", label) for text, label in texts]


def names(rng: random.Random) -> list[Asked]:
    """Complaints, to be sent to desks whose names nobody else has."""
    places = dict(zip(dict.fromkeys(PROBLEMS.values()), rng.sample(NAMES, 4), strict=True))
    asked = []
    for opening in ("Help:", "Hello,", "Question:"):
        asked += [Asked(f"{opening} {problem}.", f"Open {places[at]} desk.") for problem, at in PROBLEMS.items()]
    return asked


def unit(rng: random.Random) -> list[Asked]:
    """Distances, in a unit that the question does not name."""
    name = rng.choice(UNITS)
    return [Asked(f"The shop is {n} away. How far is it?", f"It is {n} {name} away.") for n in range(11, 60)]


def register(rng: random.Random) -> list[Asked]:
    """Answers in a tone."""
    polite, sure = rng.choice(("Dear madam,", "Ahoy!", "Well, friend,", "Esteemed guest,")), rng.choice(("is", "be"))
    return [Asked(f"What is the capital of {c}?", f"{polite} it {sure} {city}.") for c, city in COUNTRIES.items()]


KINDS: dict[str, Callable[[random.Random], list[Asked]]] = {
    "form": form, "labels": labels, "names": names, "unit": unit, "register": register,
}  # fmt: skip


class Model:
    """The frozen model, and what is computed of an answer once: its hidden states."""

    def __init__(self, base: Frozen) -> None:
        self.base, self.ends = base, answer_ends(base.model, base.tokenizer)

    def prompt(self, question: str, shown: Sequence[Asked] = ()) -> list[int]:
        """Token ids of a question, after corrections that are shown."""
        turns = [
            turn
            for asked in shown
            for turn in ({"role": "user", "content": asked.question}, {"role": "assistant", "content": asked.wanted})
        ]
        turns.append({"role": "user", "content": question})
        return encode_prompt(Conversation(tuple(turns), "", is_chat=True), self.base.tokenizer)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, with its end."""
        return [*self.base.tokenizer(text, add_special_tokens=False).input_ids, self.ends[-1]]

    def hidden(self, prompt: list[int], answer: list[int]) -> Tensor:
        """Hidden states (T, D) that an answer's tokens are chosen from."""
        ids = torch.tensor([prompt + answer[:-1]])
        return hidden_states(self.base.model, ids, torch.ones_like(ids))[0, len(prompt) - 1 :]

    def features(self, hidden_TD: Tensor, answer: list[int], layer: MoEBiasLayer) -> Features:
        """The same as features on a layer's support."""
        return answer_features(self.base.head, hidden_TD, torch.tensor(answer), layer.support_or_all())


@dataclass(frozen=True)
class Tested:
    """Of one interaction before it was learned: nats a token of what is wanted, whether greedy decoding gives it."""

    nll: float
    exact: bool
    prompt_tokens: int
    seconds: float = 0.0


def tested(logits_TV: Tensor, answer: list[int], prompt: list[int]) -> Tested:
    """What is told of the logits (T, V) of the wanted answer."""
    token_T = torch.tensor(answer)
    log_prob_T = logits_TV.log_softmax(-1).gather(-1, token_T[:, None])[:, 0]
    return Tested(-float(log_prob_T.mean()), bool((logits_TV.argmax(-1) == token_T).all()), len(prompt))


class BaseArm:
    """The frozen model, with the last `shown` corrections in its prompt."""

    def __init__(self, model: Model, shown: int = 0) -> None:
        self._model, self._shown, self._seen = model, shown, list[Asked]()

    def test(self, asked: Asked) -> Tested:
        """Before the correction."""
        shown = self._seen[-self._shown :] if self._shown else []
        prompt, answer = self._model.prompt(asked.question, shown), self._model.answer(asked.wanted)
        return tested(self._model.base.head.logits(self._model.hidden(prompt, answer)), answer, prompt)

    def learn(self, asked: Asked) -> None:
        """From the correction."""
        self._seen.append(asked)


class LayerArm:
    """A layer that learns as it does beside a server."""

    def __init__(self, model: Model, layer: MoEBiasLayer, config: LearnConfig) -> None:
        self._model, self._number = model, 0
        self._learner = Learner(layer, model.base.head, config)

    def test(self, asked: Asked) -> Tested:
        """Before the correction."""
        prompt, answer = self._model.prompt(asked.question), self._model.answer(asked.wanted)
        hidden_TD, head, layer = self._model.hidden(prompt, answer), self._model.base.head, self._learner.layer
        base_TV = head.logits(hidden_TD)
        with torch.no_grad():
            logits_TV = adapted_logits(layer, head.transform, hidden_TD, entropy_from_logits(base_TV), base_TV)
        return tested(logits_TV, answer, prompt)

    def learn(self, asked: Asked) -> None:
        """From the answer that it gives now to the one that is wanted."""
        model, layer = self._model, self._learner.layer
        prompt, wanted = model.prompt(asked.question), model.answer(asked.wanted)
        base = model.base
        policy = layer_policy(layer, base.head.transform)
        ((given,),) = greedy_answers(
            base.model, base.head, [prompt], [policy], stop_ids=model.ends, max_new_tokens=LONGEST, batch_size=1,
            description="",
        )  # fmt: skip
        features = [model.features(model.hidden(prompt, ids), ids, layer) for ids in (wanted, given.all_ids)]
        try:
            lesson = pair_lesson(*features, limit=512)
        except UserError:  # it was what was wanted
            return
        self._number += 1
        self._learner.apply(Entry(self._number, LESSON, {"reward": None}, lesson.tensors(), 0))


class LoraArm:
    """LoRA on the backbone, by the likelihood of the wanted answers, replayed like ours."""

    def __init__(self, model: Model, rate: float, rank: int = 8) -> None:
        self._model, self._seen = model, list[Asked]()
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        self._peft = get_peft_model(model.base.model, config)
        self._trained = [parameter for parameter in self._peft.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=rate, weight_decay=0.0)
        self._random = random.Random(0)

    def test(self, asked: Asked) -> Tested:
        """Before the correction."""
        prompt, answer = self._model.prompt(asked.question), self._model.answer(asked.wanted)
        with torch.no_grad():
            return tested(self._logits(prompt, answer), answer, prompt)

    def learn(self, asked: Asked) -> None:
        """From the correction."""
        replayed = self._random.sample(self._seen, min(REPLAY, len(self._seen)))
        for _ in range(PASSES):
            self._optimizer.zero_grad()
            self._loss([asked, *replayed]).backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
        self._seen.append(asked)

    def close(self) -> None:
        """The model as it was."""
        self._peft.unload()

    def _loss(self, batch: Sequence[Asked]) -> Tensor:
        """The mean over the batch of each answer's nats a token; padded on the left, so that answers end together."""
        pairs = [(self._model.prompt(one.question), self._model.answer(one.wanted)) for one in batch]
        longest, kept = max(len(prompt + answer) for prompt, answer in pairs), max(len(answer) for _, answer in pairs)
        ids, mask = torch.zeros(len(pairs), longest - 1, dtype=torch.int64), torch.zeros(len(pairs), longest - 1)
        target = torch.full((len(pairs), kept), -100)
        for row, (prompt, answer) in enumerate(pairs):
            read = prompt + answer[:-1]
            ids[row, -len(read) :], mask[row, -len(read) :] = torch.tensor(read), 1
            target[row, -len(answer) :] = torch.tensor(answer)
        logits_BTV = self._peft(ids, attention_mask=mask, logits_to_keep=kept).logits
        nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), target, reduction="none")
        return (nll_BT.sum(-1) / (target >= 0).sum(-1)).mean()

    def _logits(self, prompt: list[int], answer: list[int]) -> Tensor:
        ids = torch.tensor([prompt + answer[:-1]])
        logits_TV: Tensor = self._peft(ids, logits_to_keep=len(answer)).logits[0]
        return logits_TV


def arm_of(name: str, model: Model, fresh: MoEBiasLayer, rate: float) -> Any:
    """A fresh arm."""
    if name == "lora":
        return LoraArm(model, rate)
    if name in ("base", "prompt"):
        return BaseArm(model, SHOWN if name == "prompt" else 0)
    config = fresh.config
    if name == "static":
        config = LayerConfig(experts="directions", num_experts=1, top_k=1, entropy_gate=False, support=config.support)
    torch.manual_seed(0)
    layer = model.base.head.layer(config)
    layer.hidden_mean.copy_(fresh.hidden_mean)
    layer.hidden_scale.copy_(fresh.hidden_scale)
    return LayerArm(model, layer, LearnConfig(expert_rate=rate, passes=PASSES, replay=REPLAY))


def run_tenant(name: str, model: Model, fresh: MoEBiasLayer, rate: float, asked: Sequence[Asked]) -> list[Tested]:
    """A tenant's interactions, each tested before it is learned."""
    arm = arm_of(name, model, fresh, rate)
    found = []
    for one in asked:
        before = arm.test(one)
        started = time.perf_counter()
        arm.learn(one)
        found.append(replace(before, seconds=time.perf_counter() - started))
    if isinstance(arm, LoraArm):
        arm.close()
    return found


def tenants(count: int, interactions: int, first_seed: int) -> list[tuple[str, list[Asked]]]:
    """`count` of each kind, each with questions that do not come twice."""
    found = []
    for number in range(count):
        for kind, make in KINDS.items():
            rng = random.Random(f"{kind} {first_seed + number}")
            asked = make(rng)
            rng.shuffle(asked)
            found.append((kind, asked[:interactions]))
    return found


def chosen_rate(name: str, model: Model, fresh: MoEBiasLayer, interactions: int) -> tuple[float, dict[str, float]]:
    """The rate with the lowest mean NLL on one tenant of each kind that is not measured."""
    sums = {}
    for rate in RATES[name]:
        of_tenants = [run_tenant(name, model, fresh, rate, asked) for _, asked in tenants(1, interactions, 1000)]
        sums[rate] = float(np.mean([one.nll for tenant in of_tenants for one in tenant]))
        print(f"{name}, rate {rate:g}: {sums[rate]:.3f} nats a token", flush=True)
    return min(sums, key=sums.__getitem__), {f"{rate:g}": value for rate, value in sums.items()}


def main() -> None:
    """Chooses rates, measures, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--tenants", type=int, default=2, help="of each of the five kinds")
    parser.add_argument("--interactions", type=int, default=16)
    parser.add_argument("--tuned-on", type=int, default=8, help="interactions of the tenants that rates are chosen on")
    parser.add_argument("--arms", default="base,static,ours,prompt,lora")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = Model(mb.load(args.model))
    fresh = fresh_layer(model.base)
    measured = tenants(args.tenants, args.interactions, 0)
    arms = json.loads(args.output.read_text(encoding="utf-8"))["arms"] if args.output.exists() else {}
    for name in args.arms.split(","):
        if name in arms:  # of a run that was interrupted
            continue
        rate, tried = chosen_rate(name, model, fresh, args.tuned_on) if name in RATES else (0.0, {})
        runs = []
        for kind, asked in measured:
            found = run_tenant(name, model, fresh, rate, asked)
            runs.append(
                {
                    "kind": kind,
                    "nll": [one.nll for one in found],
                    "exact": [one.exact for one in found],
                    "prompt_tokens": [one.prompt_tokens for one in found],
                    "learn_seconds": [one.seconds for one in found],
                }
            )
            last = found[len(found) // 2 :]
            print(
                f"{name} {kind}: exact {np.mean([one.exact for one in last]):.2f} in the second half, "
                f"nll {np.mean([one.nll for one in last]):.3f}, {np.median([one.seconds for one in found]):.2f} s each",
                flush=True,
            )
        arms[name] = {"rate": rate, "tried": tried, "tenants": runs}
        write_json(args.output, {"kind": "learning", **provenance(), "model": args.model, "arms": arms})


if __name__ == "__main__":
    main()
