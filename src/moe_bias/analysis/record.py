"""`analysis.json`: what an analysis leaves for tables and reports.

An estimate is `{"value", "low", "high"}` with a 95% interval, whose ends are null where a single example
gives none. Entropies, KL and changes of log-probability are in nats. Tokens stand as `{"id", "text"}`.

    kind            "analyze"; format: "moe-bias analysis 2" (1 called flips forks)
    settings        those of the command; provenance: versions, machine, revision
    text            kind (store, data, task), name, tokens, examples, dropped (left out of the store by `keep_top`),
                    rho, threshold: the base entropy that a token of the high stratum has at least
    entropy_edges   of the histograms' bins; what lies outside is in the first or last bin
    adapters        a list, each:
      name, parameters, num_experts, top_k, support (M), strength, gate ({"alpha", "beta"} or null), kind (what an
                    expert is), rank (r; 0 where experts are not linear), free_entries, reach
      strata        all, high, low: tokens, means ({quantity: estimate}), bias_max, expert_share (E numbers that sum
                    to 1), expert_entropy. The quantities, means over tokens: base_entropy, adapted_entropy, kl,
                    weight (w), bias_mean (|b| over the support), flipped (share of tokens), mended and spoiled
                    (flipped to, or away from, the token in the text), base_right and adapted_right (the choice is
                    the token in the text), log_prob_change (of the token in the text)
      histograms    base, adapted: tokens by bin
      overlap       estimate: the share of the base's top rho that is in the adapted model's
      checkpoints   step, overlap, kl (both estimates) of each checkpoint that is there, oldest first
      mutual_information   stratum, class, place: {"nats", "at_most"}, of the expert of a routed slot
      expert_share_by_class, expert_share_by_place   by value E numbers that sum to 1; places are '0', '1', '2-3', ...
      experts       E cards: high, low (share of the stratum's routed slots), from_high (share of the expert's slots
                    that are in the high stratum), raised and lowered ([{"id", "text", "bias", "acts"}], acts: false
                    off a support that the adapter does not reach beyond), norm (of the bias where it acts), readings
                    (size; toward and away: [{"id", "text", "deviations"}]; raised and lowered:
                    `moe_bias.analysis.experts`), contexts: moments by the share of the expert's bias in the token's,
                    w g_e, largest first. Records of before there were linear experts lack acts, norm and readings,
                    and the adapter's kind, rank, free_entries and reach: their experts are free
      flips         moments of largest KL among those whose choice flipped; base_continuation and
                    adapted_continuation are greedy from there, null where the prompts are not known
      answers       null, or for a task: accuracy and change by arm (base; adapted; adapted on tokens of one stratum
                    only), turns (mended, spoiled, both right, both wrong: problems), unchanged (same answer),
                    flips_high (share of the flips that lie in the high stratum), flips: of each problem whose
                    answer changed a moment with question, gold, base_outcome, adapted_outcome and continuations

A moment is one token in its context: before (text), token (in the text), base_choice, adapted_choice,
example (row), position, base_entropy, adapted_entropy, kl, weight, experts, gates, score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from moe_bias.analysis.experts import Decode, expert_views
from moe_bias.analysis.moments import Moment
from moe_bias.analysis.summary import (
    ALL,
    StratumSummary,
    by_stratum,
    mutual_information,
    overlap_share,
    share_by_row,
)
from moe_bias.analysis.survey import Overlap, Survey
from moe_bias.analysis.tally import PLACES
from moe_bias.analysis.token_classes import CLASSES
from moe_bias.evaluation.statistics import Estimate
from moe_bias.layer import MoEBiasLayer

FORMAT = "moe-bias analysis 2"
FILE = "analysis.json"


def adapter_record(
    name: str,
    layer: MoEBiasLayer,
    found: Survey,
    shared: Overlap,
    checkpoints: Sequence[Mapping[str, Any]],
    top: int,
    decode: Decode,
) -> dict[str, Any]:
    """One adapter's entry but its flips and answers; `checkpoints` are entries of `checkpoint_record`."""
    tally = found.tally
    return {
        "name": name,
        **layer_facts(layer),
        "strata": {name: _stratum(summary) for name, summary in by_stratum(tally).items()},
        "histograms": dict(zip(("base", "adapted"), tally.histogram.tolist(), strict=True)),
        "overlap": estimate_record(overlap_share(shared)),
        "checkpoints": list(checkpoints),
        "mutual_information": {name: asdict(value) for name, value in mutual_information(tally).items()},
        "expert_share_by_class": share_by_row(tally.by_class, CLASSES),
        "expert_share_by_place": share_by_row(tally.by_place, place_names()),
        "experts": expert_cards(layer, found, top, decode),
    }


def layer_facts(layer: MoEBiasLayer) -> dict[str, Any]:
    """Its sizes, strength and gate, and what its experts are."""
    gate, config = layer.entropy_gate, layer.config
    return {
        "parameters": config.num_parameters(layer.hidden_size, layer.vocab_size),
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "support": config.support_size(layer.vocab_size),
        "strength": layer.strength,
        "gate": None if gate is None else {"alpha": gate.weight.item(), "beta": gate.bias.item()},
        "kind": config.experts,
        "rank": config.rank,
        "free_entries": config.free_entries,
        "reach": layer.reach,
    }


def checkpoint_record(step: int, found: Survey, shared: Overlap) -> dict[str, Any]:
    """A point of the series along a run."""
    kl = by_stratum(found.tally)[ALL].means["kl"]
    return {"step": step, "overlap": estimate_record(overlap_share(shared)), "kl": estimate_record(kl)}


def expert_cards(layer: MoEBiasLayer, found: Survey, top: int, decode: Decode) -> list[dict[str, Any]]:
    """What each expert says and reads, where it acts most, and its share of both strata."""
    slots_SE = found.tally.by_stratum.double()
    share_SE = slots_SE / slots_SE.sum(1, keepdim=True).clamp(min=1)
    from_high_E = slots_SE[0] / slots_SE.sum(0).clamp(min=1)
    return [
        {
            "expert": number,
            "high": float(share_SE[0, number]),
            "low": float(share_SE[1, number]),
            "from_high": float(from_high_E[number]),
            **asdict(view),
            "contexts": [moment_record(moment, decode) for moment in found.contexts[number].moments],
        }
        for number, view in enumerate(expert_views(layer, top, decode))
    ]


def moment_record(moment: Moment, decode: Decode) -> dict[str, Any]:
    """With the tokens' texts."""
    record = {**asdict(moment), "before": decode(moment.context)}
    for name in ("token", "base_choice", "adapted_choice"):
        record[name] = token_record(record[name], decode)
    return {name: value for name, value in record.items() if name not in ("context", "number")}


def token_record(token: int, decode: Decode) -> dict[str, Any]:
    """Id and text of a token."""
    return {"id": token, "text": decode([token])}


def estimate_record(estimate: Estimate) -> dict[str, float | None]:
    """An interval that there is not has null for its ends."""
    return {name: value if isfinite(value) else None for name, value in asdict(estimate).items()}


def place_names() -> list[str]:
    """Of the bins of a token's place in its answer."""
    closed = [f"{2**n}-{2 ** (n + 1) - 1}" for n in range(1, PLACES - 2)]
    return ["0", "1", *closed, f"{2 ** (PLACES - 2)}-"]


def _stratum(summary: StratumSummary) -> dict[str, Any]:
    means = {name: estimate_record(estimate) for name, estimate in summary.means.items()}
    return asdict(summary) | {"means": means}
