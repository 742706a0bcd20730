"""What a server counts, by adapter, in the form that Prometheus reads.

    moe_bias:requests_total{adapter}    answers begun
    moe_bias:tokens_total{adapter}      tokens of answers, end tokens included, whether or not the answer was complete
    moe_bias:updates_total{adapter}     versions that came of feedback
    moe_bias:rejected_total{adapter}    updates that were not published
    moe_bias:kl_to_base{adapter}        exact KL of the last update to the base, in nats a token

`adapter` is empty for the plain model, and of several adapters it is their names, ONE+OTHER.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest


class Counters:
    """Counters of one server."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made = {"labelnames": ["adapter"], "registry": self._registry}
        self._requests = Counter("moe_bias:requests", "Answers begun, by adapter", **made)  # type: ignore[arg-type]
        self._tokens = Counter("moe_bias:tokens", "Tokens written, by adapter", **made)  # type: ignore[arg-type]
        self._updates = Counter("moe_bias:updates", "Versions that came of feedback", **made)  # type: ignore[arg-type]
        self._rejected = Counter("moe_bias:rejected", "Updates that were not published", **made)  # type: ignore[arg-type]
        self._kl = Gauge("moe_bias:kl_to_base", "KL of the last update to the base, nats", **made)  # type: ignore[arg-type]

    def begun(self, adapters: Iterable[str]) -> None:
        """An answer with these adapters was begun."""
        self._requests.labels("+".join(adapters)).inc()

    def ended(self, adapters: Iterable[str], tokens: int) -> None:
        """It ended with so many tokens."""
        self._tokens.labels("+".join(adapters)).inc(tokens)

    def told(self, adapter: str, outcome: Mapping[str, Any]) -> None:
        """Feedback had this outcome."""
        if outcome["published"]:
            self._updates.labels(adapter).inc()
        elif outcome["applied"]:
            self._rejected.labels(adapter).inc()
        if outcome["base_kl"] is not None:
            self._kl.labels(adapter).set(outcome["base_kl"])

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
