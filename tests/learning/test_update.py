import copy

import pytest
import torch

from helpers.lessons import HEAD, edit, fresh_layer, rewarded
from helpers.models import randomise
from moe_bias.config import LearnConfig
from moe_bias.features.adapted import mean_kl_between, mean_kl_to_base
from moe_bias.learning.lessons import Batch
from moe_bias.learning.update import Measured, Moved, update
from moe_bias.training.optimisation import Optimisation

LESSONS = [edit(1), rewarded(0.5, 2), edit(3, length=9)]


@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_both_kls_are_those_of_the_whole_distributions(scale):
    layer, before = fresh_layer(), fresh_layer()
    randomise(layer, 1, scale)
    randomise(before, 2, scale)
    measured = Measured.of(Batch.of(LESSONS, 0.2), HEAD)
    seen = measured.batch.features, measured.logits_of, HEAD.transform
    now, then = (Moved.by(one, measured, HEAD.transform) for one in (layer, before))
    assert now.mean_kl_to(then) == pytest.approx(mean_kl_between(layer, before, *seen), rel=1e-3, abs=2e-6)
    assert now.mean_kl_to_base() == pytest.approx(mean_kl_to_base(layer, *seen), rel=1e-3, abs=2e-6)
    assert now.mean_kl_to(now) == 0


def test_an_update_is_halved_until_it_is_within_its_bounds():
    config = LearnConfig(expert_rate=0.1, passes=6)
    free, bound = fresh_layer(), fresh_layer()
    measured = Measured.of(Batch.of(LESSONS, 0.2), HEAD)
    wide = config.model_copy(update={"step_kl": 1e3, "base_kl": 1e3})
    change = update(free, Optimisation(free, wide, 1), measured, HEAD.transform, wide, 0.0)
    assert change.share == 1
    tight = config.model_copy(update={"step_kl": change.step_kl / 3})
    start = copy.deepcopy(bound)
    halved = update(bound, Optimisation(bound, tight, 1), measured, HEAD.transform, tight, 0.0)
    assert not halved.refused
    assert halved.share in (0.5, 0.25, 0.125)
    assert halved.step_kl <= tight.step_kl < change.step_kl
    for now, then, whole in zip(bound.parameters(), start.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(now - then, halved.share * (whole - then), rtol=1e-3, atol=1e-6)
