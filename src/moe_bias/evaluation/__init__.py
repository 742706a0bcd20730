"""Measuring: likelihood, accuracy, intervals."""
