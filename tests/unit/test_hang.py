"""Which rank is named when a run hangs."""

from training.hang import Beat, describe_hang


def beat(num_beats: int, *, num_phases: int, step: int = 7, phase: str = "forward") -> Beat:
    return Beat(num_beats=num_beats, num_phases=num_phases, step=step, phase=phase, phase_s=1.0)


def test_the_rank_whose_process_stands_still_is_named_even_where_it_is_ahead() -> None:
    first = [beat(10, num_phases=20), beat(10, num_phases=21, phase="backward"), beat(9, num_phases=20)]
    second = [beat(13, num_phases=20), beat(10, num_phases=21, phase="backward"), beat(12, num_phases=20)]
    assert describe_hang(first, second, timeout_s=5.0) == (
        "rank 1 is hung in step 7 (backward): stopped, dead or cut off, no heartbeat for more than 5 s; "
        "where all are: ranks 0, 2 in step 7 (forward); rank 1 in step 7 (backward)"
    )


def test_where_all_beat_the_rank_behind_is_named() -> None:
    first = [beat(10, num_phases=21, phase="backward") for _ in range(5)]
    first[3] = beat(10, num_phases=19, phase="data")
    second = [beat(13, num_phases=entry.num_phases, phase=entry.phase) for entry in first]
    assert describe_hang(first, second, timeout_s=600.0) == (
        "rank 3 is hung in step 7 (data) for more than 600 s; "
        "where all are: rank 3 in step 7 (data); ranks 0-2, 4 in step 7 (backward)"
    )


def test_where_no_rank_is_behind_all_are_named() -> None:
    first, second = ([beat(count, num_phases=4, step=2, phase="save")] * 3 for count in (1, 4))
    assert describe_hang(first, second, timeout_s=1.5) == (
        "all ranks are hung in step 2 (save) for more than 1.5 s; where all are: ranks 0-2 in step 2 (save)"
    )


def test_where_the_heartbeats_cannot_be_read_their_holder_is_named() -> None:
    verdict = describe_hang([beat(1, num_phases=1)] * 2, [None, None], timeout_s=3.0)
    assert verdict.startswith("rank 0 is hung or has ended: it holds the heartbeats of all ranks")
