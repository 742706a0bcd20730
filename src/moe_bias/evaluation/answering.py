"""Answers of a transformers model under several policies to a ledger's problems, batch by batch.

Batches are cut from all problems in order, whatever is answered already: a run that goes on has the
batches, and so to the last bit the logits, of the whole one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from moe_bias.backbone import Head
from moe_bias.evaluation.ledger import Ledger
from moe_bias.features.examples import length_limit
from moe_bias.mistakes import UserError
from moe_bias.progress import meter
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.rollout.decoding import Answer, TextAnswer
from moe_bias.rollout.policy import Policy
from moe_bias.tasks.benchmarks import Protocol
from moe_bias.tasks.conversations import answer_ends, ask, encode_prompt


@dataclass(frozen=True)
class Asker:
    """All problems as token ids with their seeds, and how they are answered, so many rows at a time."""

    prompts: Sequence[list[int]]
    seeds: Sequence[int]
    choices: AnswerChoices
    tokenizer: PreTrainedTokenizerBase
    ledger: Ledger
    rows: int

    @classmethod
    def of(
        cls,
        protocol: Protocol,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        ledger: Ledger,
        rows: int,
        instruction: str = "",
    ) -> Asker:
        """Puts the problems into the prompt template, an instruction below that, and all into the chat template.

        Raises UserError where that is wanted and there is none.
        """
        if protocol.chat and not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; turn `chat` off")
        problems = ledger.problems.problems
        asked = [ask(protocol.prompt(problem, instruction), is_chat=protocol.chat) for problem in problems]
        choices = AnswerChoices(
            protocol.samples,
            protocol.temperature,
            protocol.top_p,
            protocol.max_new_tokens,
            answer_ends(model, tokenizer, protocol.chat),
        )
        prompts = [encode_prompt(conversation, tokenizer) for conversation in asked]
        return cls(prompts, [protocol.seed_of(problem) for problem in problems], choices, tokenizer, ledger, rows)

    def check_context(self, model: Any) -> None:
        """Raises UserError where the longest prompt and answer are longer than the model's positions allow."""
        longest = max(map(len, self.prompts))
        wanted = longest + self.choices.max_new_tokens
        context = length_limit(model, wanted)
        if context < wanted:
            raise UserError(
                f"`max_new_tokens` {self.choices.max_new_tokens} and the longest prompt of {longest} tokens exceed the "
                f"model's context of {context}; give at most {context - longest}"
            )

    def ask(self, model: nn.Module, head: Head, policies: dict[str, Policy], numbers: Sequence[int]) -> None:
        """Has every policy answer the problems of these numbers, and keeps each batch's answers."""
        left = set(numbers)
        batches = self.batches(len(policies), left)
        total = sum(map(len, batches))
        with meter(", ".join(policies), total * len(policies) * self.choices.samples, "answers") as bar:
            for batch in batches:
                prompts, seeds = [self.prompts[number] for number in batch], [self.seeds[number] for number in batch]
                found = sampled_answers(model, head, prompts, list(policies.values()), self.choices, seeds, bar)
                texts = [[[self._text(answer) for answer in group] for group in by_policy] for by_policy in found]
                self.keep(list(policies), batch, texts, left)

    def batches(self, policies: int, left: Collection[int]) -> list[range]:
        """The numbers of the problems that so many policies answer at once: those batches in which any is left."""
        size = max(self.rows // (policies * self.choices.samples), 1)
        starts = range(0, len(self.prompts), size)
        all_of_them = (range(start, min(start + size, len(self.prompts))) for start in starts)
        return [batch for batch in all_of_them if any(number in left for number in batch)]

    def keep(
        self,
        names: Sequence[str],
        batch: range,
        found: Sequence[Sequence[Sequence[TextAnswer]]],
        left: Collection[int],
    ) -> None:
        """Keeps a batch's answers, by problem, policy and sample, to those problems that are left."""
        for number, by_policy in zip(batch, found, strict=True):
            if number in left:
                self.ledger.keep(number, dict(zip(names, by_policy, strict=True)))

    def _text(self, answer: Answer) -> TextAnswer:
        text = str(self.tokenizer.decode(answer.token_ids))
        return TextAnswer(text, len(answer.all_ids), answer.finished)
