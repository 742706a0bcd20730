"""What a server counts, by adapter, in the form that Prometheus reads.

    moe_bias:requests_total{adapter}    answers begun
    moe_bias:tokens_total{adapter}      tokens of answers, end tokens included, whether or not the answer was complete

`adapter` is empty for the plain model, and of several adapters it is their names, ONE+OTHER.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest


class Counters:
    """Counters of one server."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made = {"labelnames": ["adapter"], "registry": self._registry}
        self._requests = Counter("moe_bias:requests", "Answers begun, by adapter", **made)  # type: ignore[arg-type]
        self._tokens = Counter("moe_bias:tokens", "Tokens written, by adapter", **made)  # type: ignore[arg-type]

    def begun(self, adapters: Iterable[str]) -> None:
        """An answer with these adapters was begun."""
        self._requests.labels("+".join(adapters)).inc()

    def ended(self, adapters: Iterable[str], tokens: int) -> None:
        """It ended with so many tokens."""
        self._tokens.labels("+".join(adapters)).inc(tokens)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
