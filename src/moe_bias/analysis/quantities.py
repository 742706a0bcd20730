"""The means over tokens that an analysis gives, as every table of it names and writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A row of a table: its heading, the form of a number in it, and what the number is multiplied by for it."""

    heading: str
    form: str
    factor: float = 1.0


QUANTITIES = {
    "base_entropy": Quantity("entropy of the base, nats", "{:.3f}"),
    "adapted_entropy": Quantity("adapted entropy, nats", "{:.3f}"),
    "kl": Quantity("KL to the base, nats", "{:.4f}"),
    "log_prob_change": Quantity("change of the text's log-probability, nats", "{:+.3f}"),
    "bias_mean": Quantity("mean |b| over the support, nats", "{:.3f}"),
    "weight": Quantity("gate w", "{:.3f}"),
    "flipped": Quantity("choice changes, % of tokens", "{:.1f}", 100),
    "mended": Quantity("  to the text's token, %", "{:.1f}", 100),
    "spoiled": Quantity("  away from it, %", "{:.1f}", 100),
}
"""By their names in the record, whose module says what each one is."""
