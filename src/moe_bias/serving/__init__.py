"""MoE-Bias on vLLM: one frozen model, one KV cache, and an adapter for each request."""
