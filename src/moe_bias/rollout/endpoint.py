"""Answers from a server that speaks OpenAI's protocol, through the `openai` client.

Requests run side by side, one a sample, each with a seed of its own. The client sends a failed one
again, ever later; when that did not help, what other requests have brought is handed out before the
error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_bias.extras import need
from moe_bias.mistakes import UserError
from moe_bias.rollout.decoding import TextAnswer

API_KEY = "OPENAI_API_KEY"
Key = TypeVar("Key")


class EndpointError(UserError):
    """The server does not answer, or refuses to; says which and why."""


@dataclass(frozen=True)
class EndpointChoices:
    """How to sample, and how to ask: so many requests at a time, each for so long, again so often.

    `chat` False asks for the continuation of plain text.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    chat: bool
    requests: int
    timeout: float
    retries: int


class Endpoint:
    """One model of a server. Raises UserError where the client is not installed."""

    def __init__(self, url: str, model: str, choices: EndpointChoices) -> None:
        self.url, self.model, self.choices = url, model, choices
        self._client = openai_client(url, choices.timeout, choices.retries)

    def answers(self, prompts: Mapping[Key, str], seeds: Mapping[Key, int]) -> Iterator[tuple[Key, list[TextAnswer]]]:
        """The samples of each prompt, as soon as its last one is there.

        Raises EndpointError after the last prompt that can still be had.
        """
        pool = ThreadPoolExecutor(self.choices.requests)
        asked = {
            pool.submit(self._answer, prompt, seeds[key] + number): (key, number)
            for key, prompt in prompts.items()
            for number in range(self.choices.samples)
        }
        try:
            yield from self._gathered(asked)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for what was asked

    def _gathered(self, asked: Mapping[Future[TextAnswer], tuple[Key, int]]) -> Iterator[tuple[Key, list[TextAnswer]]]:
        import openai

        found: dict[Key, dict[int, TextAnswer]] = {}
        failure: Exception | None = None
        for future in as_completed(asked):
            if future.cancelled():
                continue
            key, number = asked[future]
            try:
                answer = future.result()
            except (openai.OpenAIError, EndpointError) as error:
                failure = error
                _cancel(list(asked))
                continue
            found.setdefault(key, {})[number] = answer
            if len(found[key]) == self.choices.samples:
                yield key, [answer for _, answer in sorted(found.pop(key).items())]
        if failure is not None:
            raise EndpointError(f"{self.url} gives no answers of {self.model!r} ({reason(failure)})") from failure

    def _answer(self, prompt: str, seed: int) -> TextAnswer:
        asked = {
            "model": self.model,
            "temperature": self.choices.temperature,
            "top_p": self.choices.top_p,
            "max_tokens": self.choices.max_new_tokens,
            "seed": seed,
        }
        if self.choices.chat:
            messages = [{"role": "user", "content": prompt}]
            return _read(self._client.chat.completions.create(messages=messages, **asked))
        return _read(self._client.completions.create(prompt=prompt, **asked))


def openai_client(url: str, timeout: float, retries: int) -> Any:
    """A client of the server. Raises UserError where the client is not installed."""
    need("openai", "asking a server (`endpoint`)")
    import openai

    return openai.OpenAI(
        base_url=url,
        api_key=os.environ.get(API_KEY) or "none",  # servers of one's own often want none, the client does
        max_retries=retries,
        timeout=timeout,
    )


def _read(response: Any) -> TextAnswer:
    try:
        choice, usage = response.choices[0], response.usage
        text = choice.message.content if hasattr(choice, "message") else choice.text
        tokens = None if usage is None else usage.completion_tokens
        return TextAnswer(text or "", tokens, choice.finish_reason != "length")
    except (AttributeError, IndexError, TypeError) as error:  # the client passes on whatever the server sent
        raise EndpointError(f"its answer is not of OpenAI's protocol: {str(response)[:80]!r}") from error


def _cancel(futures: Sequence[Future[TextAnswer]]) -> None:
    for future in futures:
        future.cancel()


def reason(error: Exception) -> str:
    """What the client says, and where it says nothing of it, what was below."""
    below = error.__cause__
    return " ".join(f"{error}{'' if below is None else f': {below}'}".split())
