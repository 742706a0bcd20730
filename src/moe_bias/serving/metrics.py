"""What is served, by adapter, for Prometheus: the same numbers on every server, on its page of metrics.

A request under several adapters counts for each. Those of the plain model are not here: a server counts all its
requests itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter


class AdapterCounters:
    """Requests and tokens by adapter, in one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter(
            "moe_bias:requests", "Requests that were admitted, by adapter.", ["adapter"], registry=registry
        )
        self._tokens = Counter(
            "moe_bias:tokens", "Tokens that were generated, by adapter.", ["adapter"], registry=registry
        )

    def begun(self, adapters: Iterable[str]) -> None:
        """A request for these adapters was admitted."""
        for name in adapters:
            self._requests.labels(name).inc()

    def written(self, adapters: Iterable[str], tokens: int) -> None:
        """So many tokens were generated under these adapters, for one request."""
        for name in adapters:
            self._tokens.labels(name).inc(tokens)
