"""Counts requests and tokens by adapter where vLLM's answers leave: in the process that its requests come in.

vLLM's own statistics know no adapter, and a client's answer has no count of tokens while it streams. So what is
followed is the place where each request is kept from its admission to its last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from moe_bias.serving.metrics import AdapterCounters
from moe_bias.serving.requests import adapters_of

_ADAPTERS: WeakKeyDictionary[RequestState, list[str]] = WeakKeyDictionary()
"""Of the requests that vLLM keeps, the names of their adapters."""
_COUNTERS = AdapterCounters()


def count_by_adapter() -> None:
    """Follows vLLM's `OutputProcessor`; a second call changes nothing."""
    if not hasattr(OutputProcessor.add_request, "__wrapped__"):
        OutputProcessor.add_request = _counting_requests(OutputProcessor.add_request)
        OutputProcessor.process_outputs = _counting_tokens(OutputProcessor.process_outputs)


def _counting_requests(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_request(
        self: OutputProcessor,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: Any = None,
        request_index: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, request, prompt, parent_req, request_index, *args, **kwargs)
        adapters = adapters_of(request.sampling_params)
        if adapters:
            _ADAPTERS[self.request_states[request.request_id]] = adapters
            if request_index == 0:  # the others are further samples of the same request
                _COUNTERS.begun(adapters)

    return add_request


def _counting_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(
        self: OutputProcessor, engine_core_outputs: Sequence[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state in _ADAPTERS:
                _COUNTERS.written(_ADAPTERS[state], len(output.new_token_ids))
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs
