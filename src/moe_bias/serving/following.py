"""Follows requests from their admission to their last token, in the process that they come in and their answers leave.

vLLM's own statistics know no adapter, a client's answer has no count of tokens while it streams, and its tokens and
its end are known nowhere else. So what is followed is the place where vLLM keeps each request meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from moe_bias.serving.metrics import AdapterCounters
from moe_bias.serving.requests import adapters_of


class Followed(Protocol):
    """What a follower keeps of one request; a request that is called off is forgotten without a word."""

    def written(self, token_ids: Sequence[int]) -> None:
        """So many more tokens were sampled."""
        ...

    def ended(self) -> None:
        """The answer is complete."""
        ...


class Follower(Protocol):
    """Who wants to know of requests."""

    def begin(self, request: EngineCoreRequest, index: int) -> Followed | None:
        """Sees a request before the engine does, and may add to its arguments; None where it is of no interest.

        `index` is the sample's number where several are asked for at once.
        """
        ...


class _Counting:
    """Counts requests and tokens by adapter; of several samples the first counts as the request."""

    def __init__(self) -> None:
        self._counters = AdapterCounters()

    def begin(self, request: EngineCoreRequest, index: int) -> Followed | None:
        """See `Follower`."""
        adapters = adapters_of(request.sampling_params)
        if not adapters:
            return None
        if index == 0:
            self._counters.begun(adapters)
        return _Counted(self._counters, adapters)


class _Counted:
    def __init__(self, counters: AdapterCounters, adapters: list[str]) -> None:
        self._counters, self._adapters = counters, adapters

    def written(self, token_ids: Sequence[int]) -> None:
        self._counters.written(self._adapters, len(token_ids))

    def ended(self) -> None:
        pass


_FOLLOWERS: list[Follower] = [_Counting()]
_FOLLOWED: WeakKeyDictionary[RequestState, list[Followed]] = WeakKeyDictionary()
"""Of the requests that vLLM keeps."""


def follow_requests() -> None:
    """Follows vLLM's `OutputProcessor`; a second call changes nothing."""
    if not hasattr(OutputProcessor.add_request, "__wrapped__"):
        OutputProcessor.add_request = _telling_of_requests(OutputProcessor.add_request)
        OutputProcessor.process_outputs = _telling_of_tokens(OutputProcessor.process_outputs)


def add_follower(follower: Follower) -> None:
    """From here on `follower` is told of the requests that come."""
    _FOLLOWERS.append(follower)


def remove_follower(follower: Follower) -> None:
    """It is told no more, but of the requests that it follows."""
    _FOLLOWERS.remove(follower)


def _telling_of_requests(original: Callable[..., None]) -> Callable[..., None]:
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
        found = [follower.begin(request, request_index) for follower in _FOLLOWERS]
        followed = [each for each in found if each is not None]
        if followed:
            _FOLLOWED[self.request_states[request.request_id]] = followed

    return add_request


def _telling_of_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(
        self: OutputProcessor, engine_core_outputs: Sequence[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> Any:
        states = {output.request_id: self.request_states.get(output.request_id) for output in engine_core_outputs}
        for output in engine_core_outputs:
            for followed in _FOLLOWED.get(states[output.request_id], ()):
                followed.written(output.new_token_ids)
        found = original(self, engine_core_outputs, *args, **kwargs)
        for identity, state in states.items():
            if identity not in self.request_states:
                for followed in _FOLLOWED.pop(state, ()):
                    followed.ended()
        return found

    return process_outputs
