import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.reshard import plan_transfers, rank_eighths

TPS = [1, 2, 4, 8]


def layout(tp, first_gpu=0):
    return {first_gpu + rank: rank_eighths(tp, rank) for rank in range(tp)}


@pytest.mark.parametrize(
    ("old", "new", "taus"), [(4, 8, 1), (2, 4, 2), (2, 8, 3), (4, 2, 2), (8, 4, 1), (8, 2, 3), (8, 8, 0)]
)
def test_one_instance_costs_the_taus_of_the_paper(old, new, taus):
    plan = plan_transfers(layout(old), list(range(max(old, new))), [new])
    assert plan.taus == taus
    assert plan.time_s(140e9) == pytest.approx(taus * 0.0583, rel=0.01)


def test_two_tp4_become_one_tp8_without_moving_what_can_stay():
    held = layout(4) | layout(4, first_gpu=4)
    plan = plan_transfers(held, list(range(8)), [8])
    assert plan.transfers == ()
    assert plan.kept_eighths == 8


@given(st.sampled_from(TPS), st.sampled_from([(8,), (4, 4), (4, 2, 2), (2, 2, 2, 2), (4,), (2, 2), (1, 1, 2)]))
def test_every_rank_ends_with_its_eighths_and_nothing_is_sent_twice(old, new):
    held = layout(old)
    gpus = list(range(sum(new)))
    plan = plan_transfers(held, gpus, new)
    after = {gpu: set(eighths) for gpu, eighths in held.items()}
    for t in plan.transfers:
        assert t.first_eighth in held[t.source_gpu]  # sent from what was there before
        assert t.first_eighth not in after.get(t.target_gpu, set())
        after.setdefault(t.target_gpu, set()).update(range(t.first_eighth, t.last_eighth))
    used = [gpu for placement in plan.placements for gpu in placement]
    assert sorted(used) == gpus
    for tp, placement in zip(new, plan.placements, strict=True):
        for rank, gpu in enumerate(placement):
            assert set(rank_eighths(tp, rank)) <= after[gpu]
    assert plan.kept_eighths + len(plan.transfers) == 8 * len(new)


def test_what_cannot_be_done_is_refused_by_name():
    with pytest.raises(ValueError, match="need 8 GPUs, only 4 are given"):
        plan_transfers(layout(4), list(range(4)), [8])
    with pytest.raises(ValueError, match="held by no GPU"):
        plan_transfers({0: rank_eighths(2, 0)}, [0, 1], [2])
    with pytest.raises(ValueError, match="TP3"):
        rank_eighths(3, 0)
