"""What a trained layer says and does: its experts' tokens, and its effect on text."""

from moe_bias.analysis.experts import ExpertTokens, TokenBias, strongest_tokens

__all__ = ["ExpertTokens", "TokenBias", "strongest_tokens"]
