"""Prompts, gold answers and what counts as right."""
