"""What all ranks must have in common before they train: the spec, the code, the packages, the samples.

Invariant: one rank that differs ends the start on every rank, named with its machine. Nothing later would tell: a node
with an older copy of the shards or of the code takes part in every collective, and the run is no function of its spec.
It costs one gather of a few hundred bytes a rank, at the start.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pipeline.shard_set import ShardSet
from tokenization.messages import named
from training.checkpoint import set_record
from training.config import TrainConfig
from training.ranks import Ranks

CODE = ("tokenization", "pipeline", "training")
PACKAGES = ("torch", "deepspeed", "numpy")
PLACES = {"cache_dir", "max_cache_gb"}
"""Fields of `data` that may differ from machine to machine."""
MAX_NAMED_RANKS = 3


def check_alike(config: TrainConfig, *, shard_sets: Sequence[ShardSet], ranks: Ranks) -> None:
    """Compare what this rank trains, by what and on what with the other ranks; called by every rank.

    Args:
        config: of the run.
        shard_sets: all that it reads, held out ones too.
        ranks: of the run.

    Raises:
        ValueError: a rank differs from rank 0; the same on every rank.
    """
    facts = facts_of(config, shard_sets=shard_sets)
    problem = describe_difference(ranks.gather((socket.gethostname(), facts)))
    if problem is not None:
        raise ValueError(f"start {config.run_dir}: {problem}")


def facts_of(config: TrainConfig, *, shard_sets: Sequence[ShardSet]) -> dict[str, str]:
    """Return what this rank trains, by what and on what: names with versions or digests."""
    spec = config.model_dump_json(exclude={"data": PLACES})
    facts = {"spec": hashlib.sha256(spec.encode()).hexdigest(), "code": code_digest(Path(__file__).parents[1])}
    facts |= {name: version(name) for name in PACKAGES}
    return facts | {shard_set.url: set_record(shard_set.manifest).sha256 for shard_set in shard_sets}


def code_digest(root: Path) -> str:
    """Return the sha256 over the Python sources below `root` that a rank runs."""
    digest = hashlib.sha256()
    for path in sorted(path for package in CODE for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def describe_difference(told: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """Return which ranks differ from rank 0, and in what, or None; pure.

    Args:
        told: by rank, its machine and its facts.
    """
    host, first = told[0]
    for name, value in first.items():
        others = [
            f"rank {rank} on {where} ({_short(facts.get(name))})"
            for rank, (where, facts) in enumerate(told)
            if facts.get(name) != value
        ]
        if others:
            return (
                f"every rank must have the {name} that rank 0 has on {host} ({_short(value)}), got another of "
                f"{named(others, most=MAX_NAMED_RANKS)}; bring the same to every machine and start again"
            )
    return None


def _short(value: str | None) -> str:
    return f"{value[:8]}.." if value is not None and len(value) == 64 else str(value)
