from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_bias.columns import Columns, joined


@dataclass(frozen=True)
class Inner(Columns):
    rest: Tensor


@dataclass(frozen=True)
class Outer(Columns):
    hidden: Tensor
    inner: Inner
    support: Tensor
    SHARED: ClassVar[frozenset[str]] = frozenset({"support"})


def record(*values):
    value_T = torch.tensor(values)
    return Outer(torch.stack([value_T, -value_T], dim=-1), Inner(value_T + 100), torch.tensor([7, 8, 9]))


def same(one, other):
    pairs = ((one.hidden, other.hidden), (one.inner.rest, other.inner.rest), (one.support, other.support))
    return all(torch.equal(*pair) for pair in pairs)


def test_rows_of_all_columns():
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        expected = record(3, 1) if index.dtype == torch.int64 else record(1, 3)
        assert same(record(1, 2, 3).at(index), expected)
    whole = record(1, 2, 3)
    part = whole.at(slice(1, None))
    assert same(part, record(2, 3))
    assert part.hidden.data_ptr() == whole.hidden[1:].data_ptr()
    assert part.support is whole.support


def test_parts_one_after_the_other():
    assert same(joined([record(1, 2), record(3)]), record(1, 2, 3))
    assert same(joined([record(1, 2)]), record(1, 2))


def test_all_of_it_goes_to_a_device():
    there = record(1, 2).to("meta")
    assert {there.hidden.device.type, there.inner.rest.device.type, there.support.device.type} == {"meta"}
    here = record(1, 2)
    assert here.to("cpu").hidden is here.hidden
