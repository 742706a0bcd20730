"""Sampling from the frozen model under one or more adapters."""
