"""Record files: rows come back as they were written, and an engine opens nothing else."""

import os

import pytest
import torch

from moe_bias.mistakes import UserError
from moe_bias.serving.recording import SCALARS, RowLayout, Spool


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def spool(request, tmp_path):
    return Spool(tmp_path, RowLayout.of_model(5, request.param))


def rows(count, dtype):
    scalars_TK = torch.randn(count, len(SCALARS), dtype=torch.float64)
    scalars_TK[:, 0] = torch.arange(1, count + 1)
    return scalars_TK, torch.randn(count, 5).to(dtype)


def test_rows_come_back_bit_for_bit_also_where_they_were_written_twice(spool):
    scalars_TK, hidden_TD = rows(4, spool.layout.dtype)
    spool.create("one", 6)
    file = spool.open("one", 6)
    for place, row in reversed(list(enumerate(spool.layout.packed(scalars_TK, hidden_TD)))):
        file.write(place, spool.layout.packed(scalars_TK + 1, hidden_TD + 1)[place])
        file.write(place, row)
    found_TK, found_TD = spool.read("one", 4)
    assert torch.equal(found_TK, scalars_TK)
    assert torch.equal(found_TD, hidden_TD)
    assert found_TD.dtype == spool.layout.dtype
    with pytest.raises(UserError, match="kept nothing of 1 of an answer's 5 tokens"):
        spool.read("one", 5)
    spool.remove(["one", "one"])
    assert not list(spool.folder.iterdir())


def test_a_row_without_its_hidden_state_is_empty_there(spool):
    scalars_TK, hidden_TD = rows(3, spool.layout.dtype)
    spool.create("one", 3)
    file = spool.open("one", 3)
    for place, row in enumerate(spool.layout.packed(scalars_TK, hidden_TD)):
        file.write(place, row, with_hidden=place != 1)
    found_TK, found_TD = spool.read("one", 3)
    hidden_TD[1] = 0
    assert torch.equal(found_TK, scalars_TK)
    assert torch.equal(found_TD, hidden_TD)


def test_half_precision_that_is_not_bfloat16_is_kept_in_float32():
    assert RowLayout.of_model(5, torch.float16).dtype == torch.float32


@pytest.mark.parametrize("name", ["", ".", "../one", "a/b", "/etc/passwd", ".hidden", "a\0b", None, 7, "a" * 101])
def test_names_that_are_not_plain_are_refused(spool, name):
    with pytest.raises(UserError, match="no plain file name"):
        spool.open(name, 1)


def test_links_folders_and_other_sizes_are_refused(spool, tmp_path):
    spool.create("one", 3)
    os.symlink(spool.folder / "one", spool.folder / "link")
    (spool.folder / "folder").mkdir()
    for name in ("link", "folder", "missing"):
        with pytest.raises(UserError, match="cannot be opened in MOE_BIAS_SPOOL"):
            spool.open(name, 3)
    with pytest.raises(UserError, match="need"):
        spool.open("one", 4)
