"""Engines of vLLM that a sampler asks: one in this process, or a server on this machine.

Both take token ids and give token ids with the log-probabilities of what was drawn, at the sampling
temperature. A server is asked by OpenAI's protocol (`/v1/completions`) with vLLM's own fields for
token ids; requests run side by side, and the client sends one again that did not get through.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch

from moe_bias.extras import need
from moe_bias.mistakes import UserError
from moe_bias.rollout.endpoint import EndpointError, openai_client, reason
from moe_bias.rollout.sampler import SamplingChoices

REQUEST_SECONDS = 3600.0
RETRIES = 5
BLOCK_TOKENS = 32
"""Tokens of a block of the prefix cache: prompts are short, and vLLM's own 128 on a CPU would share few of them."""


@dataclass(frozen=True)
class SampleRequest:
    """A prompt's token ids, the seed of its answer (None: any), and what the plugin is told of it."""

    prompt: list[int]
    seed: int | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class SampledTokens:
    """An answer's token ids, end token included, and the log-probability that each was drawn with."""

    token_ids: list[int]
    log_probs: list[float]


class Engine(Protocol):
    """Answers requests, in any order."""

    def answers(
        self, requests: Sequence[SampleRequest], choices: SamplingChoices
    ) -> Iterator[tuple[int, SampledTokens]]:
        """Numbers of the requests with their answers. Raises UserError where the engine refuses one."""
        ...


class LocalEngine:
    """A `vllm.LLM` of this process, which somebody made after setting MOE_BIAS_ADAPTERS and MOE_BIAS_SPOOL.

    `forgets`: every call begins with an empty prefix cache. What is in the cache decides which batches
    are computed, and so the last bits of logits; emptied, they follow from the call's arguments alone.
    """

    def __init__(self, llm: Any, forgets: bool = False) -> None:
        self._engine, self._forgets = llm.llm_engine, forgets

    def answers(
        self, requests: Sequence[SampleRequest], choices: SamplingChoices
    ) -> Iterator[tuple[int, SampledTokens]]:
        """See `Engine`. What has not been answered when the caller stops is taken back."""
        waiting: dict[str, int] = {}
        if self._forgets:
            self._engine.reset_prefix_cache()
        try:
            for number, request in enumerate(requests):
                name = f"{uuid4().hex}-{number}"
                self._ask(name, request, choices)
                waiting[name] = number
            while waiting:
                for output in self._engine.step():
                    if output.finished:
                        yield waiting.pop(output.request_id), _of_output(output.outputs[0])
        finally:
            self._engine.abort_request(list(waiting))

    def close(self) -> None:
        """Ends the engine, and gives its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _ask(self, name: str, request: SampleRequest, choices: SamplingChoices) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=choices.temperature,
            max_tokens=choices.max_new_tokens,
            seed=request.seed,
            stop_token_ids=list(choices.stop_ids),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=dict(request.arguments),
        )
        try:
            self._engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        except VLLMClientError as error:
            raise UserError(f"vLLM refuses to sample: {error}") from error


class ServerEngine:
    """The first model of a vLLM server that shares MOE_BIAS_ADAPTERS and MOE_BIAS_SPOOL with this process.

    Raises UserError where the `openai` client is not installed, EndpointError where nothing answers.
    """

    def __init__(self, url: str) -> None:
        self._url, self._client = url, openai_client(url, REQUEST_SECONDS, RETRIES)
        import openai

        try:
            self._model = self._client.models.list().data[0].id
        except (openai.OpenAIError, IndexError) as error:
            raise EndpointError(f"{url} names no models ({reason(error)})") from error

    def answers(
        self, requests: Sequence[SampleRequest], choices: SamplingChoices
    ) -> Iterator[tuple[int, SampledTokens]]:
        """See `Engine`. As many requests run at a time as `choices` has samples in a batch."""
        import openai

        pool = ThreadPoolExecutor(choices.batch_size * choices.group)
        asked = {pool.submit(self._answer, request, choices): number for number, request in enumerate(requests)}
        try:
            for future in as_completed(asked):
                yield asked[future], future.result()
        except openai.OpenAIError as error:
            raise EndpointError(f"{self._url} gives no samples of {self._model!r} ({reason(error)})") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: SampleRequest, choices: SamplingChoices) -> SampledTokens:
        own = {
            # given so that no default of the model's generation_config.json takes their place
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            "stop_token_ids": list(choices.stop_ids),
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": dict(request.arguments),
        }
        response = self._client.completions.create(
            model=self._model,
            prompt=request.prompt,
            temperature=choices.temperature,
            top_p=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            max_tokens=choices.max_new_tokens,
            seed=request.seed,
            logprobs=0,
            extra_body=own,
        )
        choice = response.choices[0]
        if getattr(choice, "token_ids", None) is None or choice.logprobs is None:
            raise EndpointError(f"{self._url} gives no token ids, so it is no server of vLLM's")
        return SampledTokens(choice.token_ids, choice.logprobs.token_logprobs)


@dataclass(frozen=True)
class EngineChoices:
    """What an engine of this process is made of.

    `dtype` is the type of its weights, `longest` the tokens of the longest prompt and answer
    together, `cache_bytes` the memory of the key-value cache.
    """

    model: str
    dtype: torch.dtype
    longest: int
    cache_bytes: int
    trust_remote_code: bool = False


def local_engine(choices: EngineChoices, adapters: Path, spool: Path) -> LocalEngine:
    """Loads the model into an engine of this process, which serves these folders and forgets from call to call.

    Raises UserError where vLLM is not installed. A process has one engine at a time.
    """
    refuse_without_vllm()
    os.environ.update(MOE_BIAS_ADAPTERS=str(adapters), MOE_BIAS_SPOOL=str(spool))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    llm = LLM(
        choices.model,
        dtype=choices.dtype,
        trust_remote_code=choices.trust_remote_code,
        max_model_len=choices.longest,
        kv_cache_memory_bytes=choices.cache_bytes,
        block_size=BLOCK_TOKENS,
        logprobs_mode="processed_logprobs",
        enable_chunked_prefill=not on_cpu,  # there it cannot be had together with seeds
        enforce_eager=on_cpu,  # there compiling takes a minute at every start
        distributed_executor_backend="uni",
        generation_config="vllm",
        seed=0,
    )
    return LocalEngine(llm, forgets=True)


def refuse_without_vllm() -> None:
    """Raises UserError where vLLM cannot be imported."""
    need("vllm", "`engine` vllm", ", or give the `endpoint` of a server")


def _of_output(output: Any) -> SampledTokens:
    token_ids = list(output.token_ids)
    log_probs = [place[token].logprob for place, token in zip(output.logprobs, token_ids, strict=True)]
    return SampledTokens(token_ids, log_probs)
