"""Objectives and the loops that minimise them."""
