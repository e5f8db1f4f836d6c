from dataclasses import replace
from typing import Any

import pytest

from orchestrator.runs.heartbeat import Beat
from orchestrator.scheduling.decisions.liveness import Place, Sighting, find_hang, find_straggler

USUAL_STEP_S = 1.0


def sighting(rank: int, *, unseen_s: float = 0.5, host: str | None = None, **beat: Any) -> Sighting:
    values = {"phase": "waiting", "step": 7, "still_s": 100.0, "collectives": 50, "usual_step_s": USUAL_STEP_S}
    place = Place(rank=rank, host=host or f"host-{rank // 2}", node_ip="10.0.0.1", node_id=f"node-{rank}", pid=rank)
    return Sighting(place=place, beat=Beat(**{**values, **beat}), unseen_s=unseen_s)


def ranks(world_size: int = 4, **of_rank: dict[str, Any]) -> dict[int, Sighting]:
    """All wait, except for what is said of `rank_N`."""
    return {rank: sighting(rank, **of_rank.get(f"rank_{rank}", {})) for rank in range(world_size)}


def hang(found: dict[int, Sighting], **options: Any) -> Any:
    return find_hang(found, **{"world_size": len(found), **options})


def culprits(found: dict[int, Sighting], **options: Any) -> list[int]:
    verdict = hang(found, **options)
    assert verdict is not None
    return [place.rank for place in verdict.culprits]


# -- hangs: who ------------------------------------------------------------------------------------------------------


def test_a_stopped_process_is_named_with_its_host() -> None:
    verdict = hang(ranks(rank_2={"still_s": 1.0, "unseen_s": 90.0, "phase": "computing"}))
    assert [place.rank for place in verdict.culprits] == [2]
    assert verdict.still_s == pytest.approx(91.0)
    assert "rank 2 on host-1 (pid 2) gave no sign for 91 s" in verdict.reason


def test_a_rank_at_work_while_all_others_wait_is_named() -> None:
    verdict = hang(ranks(rank_1={"phase": "computing"}))
    assert [place.rank for place in verdict.culprits] == [1]
    assert verdict.reason == "rank 1 on host-0 (pid 1) stood still for 100 s while computing after step 7"


def test_inside_a_step_the_rank_that_begun_fewer_collectives_is_named() -> None:
    at_work = {f"rank_{rank}": {"phase": "computing"} for rank in range(4)}
    at_work["rank_3"]["collectives"] = 49
    verdict = hang(ranks(**at_work))
    assert [place.rank for place in verdict.culprits] == [3]
    assert "rank 3" in verdict.reason
    assert "has not come to where ranks 0, 1, 2 wait" in verdict.reason


def test_several_culprits_of_one_host_are_all_named() -> None:
    found = ranks(6, rank_4={"unseen_s": 90.0}, rank_5={"unseen_s": 90.0})
    assert culprits(found) == [4, 5]


def test_a_network_fault_blames_nobody_and_names_the_hosts() -> None:
    verdict = hang(ranks())
    assert verdict.culprits == ()
    assert "nobody stands out, look at the network between host-0, host-1" in verdict.reason


def test_ranks_that_are_all_cut_off_or_all_stopped_leave_nobody_to_blame() -> None:
    found = {rank: sighting(rank, unseen_s=90.0) for rank in range(4)}
    assert culprits(found) == []
    assert "gave no sign" in hang(found).reason


def test_the_only_rank_is_blamed() -> None:
    assert culprits(ranks(1, rank_0={"unseen_s": 90.0})) == [0]
    assert culprits(ranks(1, rank_0={"phase": "computing"})) == [0]


def test_a_rank_that_never_came_up_is_said() -> None:
    found = ranks(4)
    del found[3]
    verdict = hang(found, world_size=4)
    assert verdict.culprits == ()
    assert "rank 3 never gave a sign" in verdict.reason


def test_a_thousand_ranks_make_no_endless_sentence() -> None:
    found = {rank: sighting(rank, phase="computing" if rank % 2 else "waiting") for rank in range(1000)}
    assert len(hang(found).reason) < 300


# -- hangs: when -----------------------------------------------------------------------------------------------------


def test_nobody_is_blamed_before_the_first_pulse() -> None:
    assert find_hang({}, world_size=2) is None


def test_a_run_in_which_anyone_moves_does_not_hang() -> None:
    assert hang(ranks(rank_1={"still_s": 3.0, "phase": "computing"})) is None


def test_a_cut_off_rank_of_a_run_that_goes_on_is_left_to_ray() -> None:
    moving = {rank: sighting(rank, still_s=0.2) for rank in range(3)}
    assert hang({**moving, 3: sighting(3, unseen_s=500.0)}) is None


def test_a_minute_is_waited_for_by_default_and_less_on_request() -> None:
    found = ranks(rank_1={"phase": "computing", "still_s": 50.0}, rank_0={"still_s": 50.0})
    assert hang(found) is None
    assert culprits(found, timeout_s=40.0) == [1]


def test_long_steps_are_given_their_time_whatever_the_timeout() -> None:
    found = {rank: sighting(rank, usual_step_s=30.0, still_s=200.0) for rank in range(2)}
    assert hang(found, timeout_s=5.0) is None
    slower = {rank: replace(seen, beat=replace(seen.beat, still_s=301.0)) for rank, seen in found.items()}
    assert hang(slower, timeout_s=5.0) is not None


@pytest.mark.parametrize(
    ("phase", "patience_s"),
    [("starting", 300), ("loading", 300), ("evaluating", 20), ("saving", 100), ("exporting", 100), ("computing", 10)],
)
def test_each_phase_has_its_own_patience(phase: str, patience_s: float) -> None:
    for still_s, expected in ((patience_s - 1, False), (patience_s + 1, True)):
        found = ranks(rank_0={"phase": phase, "still_s": still_s})
        assert (hang(found, timeout_s=10.0) is not None) is expected


def test_the_first_step_is_given_longer() -> None:
    found = {rank: sighting(rank, usual_step_s=None, phase="computing", still_s=40.0) for rank in range(2)}
    assert hang(found, timeout_s=10.0) is None
    assert hang(found, timeout_s=7.0) is not None


def test_a_process_that_is_stopped_while_it_saves_gets_no_more_time_for_that() -> None:
    assert culprits(ranks(rank_0={"phase": "saving", "unseen_s": 30.0, "still_s": 0.5}), timeout_s=20.0) == [0]


def test_a_late_post_alone_is_no_silence() -> None:
    found = ranks(rank_0={"phase": "saving", "unseen_s": 3.0, "still_s": 30.0})
    assert hang(found, timeout_s=20.0) is None


# -- stragglers ------------------------------------------------------------------------------------------------------


def test_a_straggler_is_named_with_its_ratio() -> None:
    found = find_straggler(ranks(**{f"rank_{r}": own(0.5 if r == 2 else 0.2) for r in range(4)}))
    assert found is not None
    assert found.place.rank == 2
    assert found.ratio == pytest.approx(2.5)
    assert "rank 2 on host-1" in found.reason
    assert "2.5 times faster" in found.reason


def own(low_s: float, high_s: float | None = None) -> dict[str, Any]:
    return {"own_low_s": low_s, "own_high_s": low_s if high_s is None else high_s}


def test_noise_on_a_shared_machine_makes_no_straggler() -> None:
    assert find_straggler(ranks(2, rank_0=own(0.4, 0.9), rank_1=own(0.2, 0.4))) is None
    assert find_straggler(ranks(2, rank_0=own(0.4, 0.9), rank_1=own(0.2, 0.22))) is not None


def test_one_of_two_ranks_can_be_a_straggler() -> None:
    found = find_straggler(ranks(2, rank_0=own(0.5), rank_1=own(0.2)))
    assert found is not None
    assert found.place.rank == 0


@pytest.mark.parametrize("own_s", [[0.20, 0.21, 0.25, 0.29], [0.001, 0.001, 0.001, 0.0025], [0.4, 0.4, 0.4, 0.1]])
def test_small_differences_and_quick_ranks_make_no_straggler(own_s: list[float]) -> None:
    assert find_straggler(ranks(**{f"rank_{rank}": own(value) for rank, value in enumerate(own_s)})) is None


def test_nobody_is_a_straggler_before_all_have_worked_long_enough_or_alone() -> None:
    assert find_straggler(ranks(2, rank_0=own(0.5))) is None
    assert find_straggler(ranks(1, rank_0=own(0.5))) is None
    assert find_straggler({}) is None
