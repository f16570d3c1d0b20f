"""The lists equal those of torch.distributed.pipelining, whose generators nobody here wrote.

torch keeps them in private methods, which need only a few numbers of the object that owns them.
"""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as theirs

from picotron_lab.schedules.actions import ScheduleError
from picotron_lab.schedules.costs import Options
from picotron_lab.schedules.registry import build

KINDS = {"F": "F", "B": "BW", "I": "B", "W": "W"}  # torch's letters
SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8) for m in (1, 2, 3, 4, 6, 7, 8, 12, 15, 16, 24)]


def strings(actions) -> list[str]:
    """torch's actions as ours are written, without its idle slots and reductions."""
    written = []
    for action in actions:
        if action is None or "REDUCE" in str(action.computation_type.name):
            continue
        if action.sub_actions:
            written.append("&".join(strings(action.sub_actions)))
        else:
            kind = KINDS[action.computation_type.value]
            written.append(f"{kind}{action.stage_index}.{action.microbatch_index}")
    return written


def several_stages(schedule: type, p: int, m: int, v: int) -> list[list[str]]:
    rounds = max(1, m // p)
    numbers = {"n_local_stages": v, "pp_group_size": p, "num_stages": p * v, "_n_microbatches": m}
    owner = SimpleNamespace(**numbers, number_of_rounds=rounds, microbatches_per_round=m // rounds)
    return [strings(schedule._calculate_single_rank_operations(owner, r)) for r in range(p)]


def one_stage(schedule: type, p: int, m: int) -> list[list[str]]:
    """What a rank of Schedule1F1B or ScheduleGPipe does when it runs, noted by its stage."""
    lists = []
    for r in range(p):
        done = []
        stage = SimpleNamespace(
            stage_index=r,
            forward_one_chunk=lambda i, *_, done=done, r=r, **__: done.append(f"F{r}.{i}"),
            backward_one_chunk=lambda i, *_, done=done, r=r, **__: done.append(f"BW{r}.{i}"),
            perform_reduce_grad=lambda *_: None,
            **dict.fromkeys(("get_fwd_recv_ops", "get_fwd_send_ops"), lambda _: []),
            **dict.fromkeys(("get_bwd_recv_ops", "get_bwd_send_ops"), lambda _: []),
        )
        ignored = ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses")
        owner = SimpleNamespace(
            _stage=stage, _num_stages=p, _n_microbatches=m, scale_grads=False, has_backward=True,
            _check_inputs=lambda *_: ([()] * m, [{}] * m),
            **dict.fromkeys(ignored, lambda *_: None),
        )  # fmt: skip
        schedule._step_microbatches(owner)
        lists.append(done)
    return lists


def ours(name: str, p: int, m: int, v: int = 0) -> list[list[str]]:
    return [list(map(str, items)) for items in build(name, p, m, Options(v)).lists]


@pytest.mark.parametrize(
    ("name", "schedule"), [("afab", theirs.ScheduleGPipe), ("1f1b", theirs.Schedule1F1B)]
)
def test_one_stage_per_rank(name, schedule):
    for p, m in SIZES:
        assert ours(name, p, m) == one_stage(schedule, p, m), (p, m)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("interleaved", theirs.ScheduleInterleaved1F1B),
        ("interleaved-zb", theirs.ScheduleInterleavedZeroBubble),
    ],
)
@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_interleaved(name, schedule, v):
    for p, m in SIZES:
        if m % max(1, m // p):  # torch refuses these, and so do we
            with pytest.raises(ScheduleError, match=f"{m} micro-batches evenly"):
                build(name, p, m, Options(v))
        else:
            assert ours(name, p, m, v) == several_stages(schedule, p, m, v), (p, m)


def test_zb_h1_is_the_interleaved_one_with_one_stage():
    for p, m in ((2, 2), (3, 6), (4, 4), (4, 16), (8, 24)):
        expected = several_stages(theirs.ScheduleInterleavedZeroBubble, p, m, 1)
        assert ours("zb-h1", p, m) == expected, (p, m)


def test_zb_v():
    for p, m in SIZES:
        assert ours("zb-v", p, m) == several_stages(theirs.ScheduleZBVZeroBubble, p, m, 2), (p, m)


def test_dual_pipe_v():
    for p, m in SIZES:
        if m >= 2 * p:
            expected = several_stages(theirs.ScheduleDualPipeV, p, m, 2)
            assert ours("dualpipe-v", p, m) == expected, (p, m)
