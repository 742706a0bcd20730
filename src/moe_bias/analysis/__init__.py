"""What a trained layer says and does: its experts' tokens, and its effect on text."""

from moe_bias.analysis.experts import (
    Decode,
    ExpertView,
    Reading,
    TokenBias,
    TokenLean,
    any_off_support,
    expert_views,
    marked,
    spelled,
    strongest,
    view_of_record,
)

__all__ = [
    "Decode",
    "ExpertView",
    "Reading",
    "TokenBias",
    "TokenLean",
    "any_off_support",
    "expert_views",
    "marked",
    "spelled",
    "strongest",
    "view_of_record",
]
