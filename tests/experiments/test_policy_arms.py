"""The table of `moe-bias compare`, from records made by hand."""

from dataclasses import replace

import pytest

from moe_bias.experiments.arm import ArmRecords
from moe_bias.experiments.policy_arms import ARMS, PolicyArm, compare_policies
from moe_bias.mistakes import UserError
from moe_bias.records import RecordKind


def arm(name: str, seed: int, right: list[float]) -> PolicyArm:
    return PolicyArm(
        name=name,
        seed=seed,
        parameters=10,
        sampled_tokens=100 * (seed + 1),
        seconds=10.0 * (seed + 1),
        warm_seconds=0.0,
        updating_seconds=1.0,
        peak_bytes=seed,
        right={"held out": right, "held out before": [0.0] * len(right)},
        curve=[],
    )


def test_rows_by_hand():
    # Solved by problem, means over seeds: moe-bias 1, 1/2, 1/2, 0; base 1, 0, 0, 0.
    rows = compare_policies(
        [
            arm("base", 0, [1.0, 0.0, 0.0, 0.0]),
            arm("moe-bias", 1, [1.0, 1.0, 1.0, 0.0]),
            arm("moe-bias", 0, [1.0, 0.0, 0.0, 0.0]),
        ]
    )
    assert [(row.name, row.seeds, row.by_seed) for row in rows] == [("base", 1, [0.25]), ("moe-bias", 2, [0.25, 0.75])]
    ours = rows[1]
    assert ours.accuracy["held out"].value == 0.5
    never = ours.accuracy["held out before"]
    assert never.value == never.low == 0.0
    assert never.high == pytest.approx(0.49, abs=0.01)  # Wilson's interval of 0 of 4
    assert ours.gain["held out"].value == 0.5
    assert list(ours.gain) == ["held out"]
    assert ours.change["base"].value == 0.25
    assert ours.change["base"].low < 0.25 < ours.change["base"].high
    assert list(ours.change) == ["base"]
    assert rows[0].change == rows[0].gain == {}
    assert (ours.sampled_tokens, ours.seconds, ours.peak_bytes) == (150, 15.0, 1)
    assert ours.updating_share == pytest.approx(1 / 15)


def test_tokens_stand_beside_accuracy_by_hand():
    before = {"held out before": [10.0, 20.0]}
    runs = [
        replace(arm("moe-bias", seed, [1.0, 0.0]), tokens={"held out": lengths, **before})
        for seed, lengths in enumerate(([8.0, 4.0], [6.0, 6.0]))
    ]
    (row,) = compare_policies(runs)
    assert row.tokens["held out"].value == 6  # (7 + 5) / 2
    assert row.tokens_gain["held out"].value == -9  # (7 - 10 + 5 - 20) / 2
    assert row.accuracy["held out"].value == 0.5
    (older,) = compare_policies([*runs[:1], arm("moe-bias", 1, [1.0, 0.0])])
    assert older.tokens == older.tokens_gain == {}  # a record of before does not know


def test_arms_of_other_problems_are_refused():
    with pytest.raises(UserError, match="'moe-bias' and 'base' are of different held-out problems"):
        compare_policies([arm("base", 0, [1.0, 0.0]), arm("moe-bias", 0, [1.0])])


def test_records_come_back_in_the_order_of_arms_and_seeds(tmp_path):
    records = ArmRecords(tmp_path, RecordKind.ARMS, PolicyArm)
    assert records.all(ARMS) == []
    kept = [arm("moe-bias", 2, [1.0]), arm("moe-bias", 10, [0.0]), arm("moe-bias-sft", 0, [1.0]), arm("lora", 1, [1.0])]
    for each in reversed(kept):
        records.save(each, {})
    assert records.all(ARMS) == kept
    assert records.load("moe-bias", 3) is None
    records.save(replace(kept[0], name="no arm"), {})
    assert records.all(ARMS) == kept
    (tmp_path / "arms" / "lora-seed1.json").write_text("{")
    with pytest.raises(UserError, match=r"lora-seed1.json' is damaged: .*; remove it to run the arm again"):
        records.all(ARMS)
