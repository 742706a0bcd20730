"""Cells of a sweep as if they had been trained."""

from moe_bias.experiments.cells import Cell


def cell_of(name, seed, nll, high=(1.0, 1.0), low=(1.0, 0.0), tokens=(2.0, 2.0)) -> Cell:
    by_name = {"all": nll, "high": [n / 2 for n in nll], "low": [n / 2 for n in nll]}
    return Cell(name, seed, 10, 100, 1.5, 0.5, by_name, {"all": list(tokens), "high": list(high), "low": list(low)})
