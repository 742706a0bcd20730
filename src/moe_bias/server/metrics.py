"""What a server that learns counts besides requests and tokens, by adapter, in the form that Prometheus reads.

moe_bias:updates_total{adapter}     versions that came of feedback
moe_bias:rejected_total{adapter}    updates that were not published
moe_bias:kl_to_base{adapter}        exact KL of the last update to the base, in nats a token
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from moe_bias.serving.metrics import AdapterCounters


class LearningCounters:
    """What became of feedback, in one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        label = ["adapter"]
        self._updates = Counter("moe_bias:updates", "Versions that came of feedback.", label, registry=registry)
        self._rejected = Counter("moe_bias:rejected", "Updates that were not published.", label, registry=registry)
        self._kl = Gauge("moe_bias:kl_to_base", "KL of the last update to the base, nats.", label, registry=registry)

    def told(self, adapter: str, outcome: Mapping[str, Any]) -> None:
        """Feedback had this outcome."""
        if outcome["published"]:
            self._updates.labels(adapter).inc()
        elif outcome["applied"]:
            self._rejected.labels(adapter).inc()
        if outcome["base_kl"] is not None:
            self._kl.labels(adapter).set(outcome["base_kl"])


class Counters(AdapterCounters):
    """Counters of one server of ours, and of what it learns."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        super().__init__(self._registry)
        self.learning = LearningCounters(self._registry)

    def text(self) -> bytes:
        """All of them."""
        return bytes(generate_latest(self._registry))
