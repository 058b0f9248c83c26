import pytest

from edm2.train import learning_rate


def test_schedule_equals_golden(golden):
    for row in golden("lr_schedule.json"):
        lr = learning_rate(
            row["cur_nimg"],
            batch_size=row["batch_size"],
            ref_lr=row["ref_lr"],
            ref_batches=row["ref_batches"],
            rampup_mimg=row["rampup_Mimg"],
        )
        assert lr == pytest.approx(row["lr"], rel=1e-9)


def test_parts_can_be_switched_off():
    assert learning_rate(0, batch_size=8, ref_lr=0.1, ref_batches=0, rampup_mimg=0) == 0.1
    assert learning_rate(1e9, batch_size=8, ref_lr=0.1, ref_batches=0, rampup_mimg=1) == 0.1
    assert learning_rate(32, batch_size=8, ref_lr=0.1, ref_batches=1, rampup_mimg=0) == pytest.approx(0.05)
