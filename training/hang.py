"""Who hangs, told from two readings of what all ranks say of themselves; pure.

A rank whose beats stand still between the readings is stopped, dead or cut off. Where all beat, the one that hangs is
the one that has begun the fewest phases: the others wait for it in a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    num_beats: int
    """Times it has said so."""
    num_phases: int
    """Phases that it has begun; all ranks go through the same ones."""
    step: int
    phase: str
    phase_s: float
    """How long it has been in the phase."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"step {self.step} ({self.phase})"


def describe_hang(first: Sequence[Beat | None], second: Sequence[Beat | None], *, timeout_s: float) -> str:
    """Return one line that names the ranks that hang and says where every rank is.

    Args:
        first: by rank, the last beat at some moment; all None where the holder of the beats, rank 0, did not answer.
        second: the same, a few beats later.
        timeout_s: longest that a phase may take.
    """
    if None in first or None in second:
        return (
            f"rank 0 is hung or has ended: it holds the heartbeats of all ranks and does not answer, and a phase did "
            f"not end in {timeout_s:g} s; see its log"
        )
    beats = [beat for beat in second if beat is not None]
    everywhere = "; ".join(f"{_told(ranks)} in {place}" for place, ranks in _ranks_by_place(beats).items())
    return f"{_culprits(first, beats)} for more than {timeout_s:g} s; where all are: {everywhere}"


def _culprits(first: Sequence[Beat | None], beats: Sequence[Beat]) -> str:
    pairs = list(zip(first, beats, strict=True))
    silent = [rank for rank, (old, new) in enumerate(pairs) if old is not None and old.num_beats == new.num_beats]
    if silent:
        verb = "is" if len(silent) == 1 else "are"
        return f"{_told(silent)} {verb} hung in {beats[silent[0]].place}: stopped, dead or cut off, no heartbeat"
    least = min(beat.num_phases for beat in beats)
    behind = [rank for rank, beat in enumerate(beats) if beat.num_phases == least]
    if len(behind) == len(beats) > 1:
        return f"all ranks are hung in {beats[0].place}"
    verb = "is" if len(behind) == 1 else "are"
    return f"{_told(behind)} {verb} hung in {beats[behind[0]].place}"


def _ranks_by_place(beats: Sequence[Beat]) -> dict[str, list[int]]:
    """Return the ranks in each place, the place furthest behind first."""
    places: dict[str, list[int]] = {}
    for rank in sorted(range(len(beats)), key=lambda rank: beats[rank].num_phases):
        places.setdefault(beats[rank].place, []).append(rank)
    return places


def _told(ranks: Iterable[int]) -> str:
    """Return `rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    is_one = len(runs) == 1 and len(runs[0]) == 1
    return f"rank {texts[0]}" if is_one else f"ranks {', '.join(texts)}"
