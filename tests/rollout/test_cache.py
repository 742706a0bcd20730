"""The roomy cache against transformers' dynamic one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from moe_bias.rollout import cache
from moe_bias.rollout.cache import roomy_cache


def tokens(rows, count, seed):
    return torch.randn(2, rows, 3, count, 4, generator=torch.Generator().manual_seed(seed)).unbind()


@given(st.lists(st.one_of(st.integers(1, 5), st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))))
def test_holds_what_the_dynamic_cache_holds_whatever_is_added_and_kept(steps):
    """A number adds so many tokens; a list keeps those of the rows that there are, in its order."""
    caches, rows = (roomy_cache(), DynamicCache()), 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ROOM", 2)
        for one in caches:
            one.update(*tokens(2, 3, 0), 0)
            one.batch_repeat_interleave(2)
        for seed, step in enumerate(steps):
            if isinstance(step, int):
                found, expected = (one.update(*tokens(rows, step, seed), 0) for one in caches)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            elif kept := [row for row in step if row < rows]:
                rows = len(kept)
                for one in caches:
                    one.batch_select_indices(torch.tensor(kept))
            assert caches[0].get_seq_length() == caches[1].get_seq_length()
            assert torch.equal(caches[0].layers[0].values, caches[1].layers[0].values)


def test_tokens_are_added_and_rows_dropped_without_copying_the_others():
    one = roomy_cache()
    one.update(*tokens(4, 3, 0), 0)
    place = one.layers[0].keys.data_ptr()
    one.update(*tokens(4, 1, 1), 0)
    one.batch_select_indices(torch.tensor([0, 3, 2]))
    assert one.layers[0].keys.data_ptr() == place
    assert one.layers[0].keys.shape == (3, 3, 4, 4)
