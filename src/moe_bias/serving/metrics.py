"""What is served, by adapter, for Prometheus: the same numbers on every server, on its page of metrics.

A request under several adapters counts for each. Those of the plain model are not here: a server counts all its
requests itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter

_REQUESTS = Counter("moe_bias:requests", "Requests that were admitted, by adapter.", ["adapter"])
_TOKENS = Counter("moe_bias:tokens", "Tokens that were generated, by adapter.", ["adapter"])


def count_request(adapters: Iterable[str]) -> None:
    """A request for these adapters was admitted."""
    for name in adapters:
        _REQUESTS.labels(name).inc()


def count_tokens(adapters: Iterable[str], tokens: int) -> None:
    """So many tokens were generated under these adapters, for one request."""
    for name in adapters:
        _TOKENS.labels(name).inc(tokens)
