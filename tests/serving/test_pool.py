"""Adapters in a worker's memory."""

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.models import randomise
from moe_bias.backbone import OutputRows
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.layer import module as layer_module
from moe_bias.serving.pool import AdapterPool, layer_bytes

ONE, TWO, THREE = Path("1"), Path("2"), Path("3")


def pool_of(count):
    """A pool with room for `count` layers, and the versions that it has loaded."""
    loaded = []

    def load(version):
        loaded.append(version)
        return MoEBiasLayer(LayerConfig(experts="free", num_experts=3, support=(1, 2)), 5, 7)

    return AdapterPool(load, count * layer_bytes(load(ONE))), loaded


def test_bytes_of_a_layer_are_those_of_its_tensors():
    # Router 3 x 5, experts 3 x 2, gate 2, mean and scale 5 each: 33 float32; the support: 2 int64.
    assert layer_bytes(MoEBiasLayer(LayerConfig(experts="free", num_experts=3, support=(1, 2)), 5, 7)) == 33 * 4 + 2 * 8


def test_bytes_of_a_layer_count_its_table_and_no_rows_of_the_embedding():
    config = LayerConfig(experts="linear", expert_rank=2, num_experts=3, free_entries=True, support=(1, 2))
    layer = MoEBiasLayer(config, 5, 7, OutputRows(nn.Linear(5, 7))).requires_grad_(False)
    before = layer_bytes(layer)
    # Router and directions 3 x 5 each, what linear experts write and read 3 x 2 x 5 each, entries 3 x 2, gate 2,
    # mean and scale 5 each: 108 float32; the support: 2 int64.
    assert before == 108 * 4 + 2 * 8
    layer.table()
    assert layer_bytes(layer) - before == 4 * 3 * (1 + 2) * 2


@pytest.mark.parametrize("reach", ["support", "vocabulary"])
@pytest.mark.parametrize("support", [(0, 3, 6), None])
def test_a_table_made_from_a_few_rows_at_a_time_is_the_whole_one(monkeypatch, support, reach):
    config = LayerConfig(
        experts="linear", expert_rank=2, num_experts=3, free_entries=True, support=support, reach=reach
    )
    torch.manual_seed(0)
    layer = MoEBiasLayer(config, 5, 7, OutputRows(nn.Linear(5, 7)))
    randomise(layer)
    with torch.no_grad():
        whole = layer.table()
    monkeypatch.setattr(layer_module, "_PIECE", 2 * 5)
    frozen = layer.requires_grad_(False).double().table()
    torch.testing.assert_close(frozen, whole.double(), rtol=1e-5, atol=1e-6)  # whole is float32
    assert layer.table() is frozen


def test_a_layer_is_loaded_once_while_there_is_room():
    pool, loaded = pool_of(2)
    loaded.clear()
    assert pool.get(ONE) is pool.get(ONE)
    pool.get(TWO)
    pool.get(ONE)
    assert loaded == [ONE, TWO]


def test_the_one_not_asked_for_the_longest_goes_first():
    pool, loaded = pool_of(2)
    loaded.clear()
    for version in (ONE, TWO, ONE, THREE, ONE, TWO):
        pool.get(version)
    assert loaded == [ONE, TWO, THREE, TWO]
    assert pool.held_bytes == 2 * layer_bytes(pool.get(ONE))


def test_one_layer_is_held_beyond_the_budget():
    pool, loaded = pool_of(0)
    loaded.clear()
    for version in (ONE, ONE, TWO):
        pool.get(version)
    assert loaded == [ONE, TWO]
