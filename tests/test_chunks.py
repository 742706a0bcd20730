import pytest
import torch

from moe_bias.chunks import AtOnce, even_slices
from moe_bias.layer import entropy_from_logits, entropy_in_pieces


@pytest.mark.parametrize(("device", "width", "rows"), [("cpu", 3, 3), ("cpu", 11, 1), ("cuda", 3, 33), ("meta", 3, 33)])
def test_rows_that_fit(device, width, rows):
    # 10 // 3 = 3 rows of 3; a row of 11 is one all the same; 100 // 3 = 33.
    assert AtOnce(cpu=10, gpu=100).rows(width, torch.device(device)) == rows


@pytest.mark.parametrize(("tokens", "bounds"), [(7, [(0, 3), (3, 6), (6, 9)]), (4, [(0, 2), (2, 4)]), (0, [(0, 1)])])
def test_slices_are_even(tokens, bounds):
    # 7 tokens by at most 3 are 3 slices of ceil(7 / 3) = 3.
    assert [(found.start, found.stop) for found in even_slices(tokens, 3)] == bounds


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 9])
def test_entropy_in_pieces_has_the_bits_of_all_at_once(tokens, monkeypatch):
    monkeypatch.setattr("moe_bias.layer.entropy.ENTROPY", AtOnce(4 * 50, 4 * 50))
    logits_NV = 5 * torch.randn(tokens, 50)
    seen = []
    found_N = entropy_in_pieces(logits_NV, 50, lambda piece: seen.append(len(piece)) or 2 * piece)
    assert torch.equal(found_N, entropy_from_logits(2 * logits_NV))
    assert max(seen) <= 4
    assert sum(seen) == tokens
