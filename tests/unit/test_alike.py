"""What ranks must have in common, and which of them is named."""

import hashlib
from pathlib import Path

from synthetic_shards import train_config

from training.alike import code_digest, describe_difference, facts_of

FACTS = {"spec": "a" * 64, "code": "b" * 64, "torch": "2.11.0", "/data/set": "c" * 64}


def told(**others: tuple[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Of four ranks on two machines, `rank_2=("torch", "2.10.0")` says what one of them has otherwise."""
    changes = {int(name.removeprefix("rank_")): dict([change]) for name, change in others.items()}
    return [(f"node-{rank // 2}", FACTS | changes.get(rank, {})) for rank in range(4)]


def test_ranks_that_have_all_in_common_may_start() -> None:
    assert describe_difference(told()) is None
    assert describe_difference(told()[:1]) is None


def test_the_rank_that_differs_is_named_with_its_machine_and_with_what() -> None:
    assert describe_difference(told(rank_2=("torch", "2.10.0"))) == (
        "every rank must have the torch that rank 0 has on node-0 (2.11.0), got another of rank 2 on node-1 (2.10.0); "
        "bring the same to every machine and start again"
    )


def test_another_shard_set_at_the_same_place_is_another() -> None:
    told_of = describe_difference(told(rank_3=("/data/set", "d" * 64)))
    assert told_of is not None
    assert "have the /data/set that rank 0 has on node-0 (cccccccc..), got another of rank 3 on node-1 (dd" in told_of


def test_of_many_ranks_three_are_named() -> None:
    host_facts = [("node", FACTS)] + [(f"node-{rank}", FACTS | {"code": "e" * 64}) for rank in range(1, 1024)]
    told_of = describe_difference(host_facts)
    assert told_of is not None
    assert (
        "rank 1 on node-1 (eeeeeeee..), rank 2 on node-2 (eeeeeeee..), rank 3 on node-3 (eeeeeeee..) and 1020 more"
        in (told_of)
    )


def test_where_a_machine_keeps_shards_may_differ_and_the_rest_of_the_spec_may_not(tmp_path: Path) -> None:
    specs = [
        facts_of(train_config(tmp_path, shards=tmp_path, **changes), shard_sets=[])["spec"]
        for changes in ({}, {"data__cache_dir": "/scratch/a"}, {"data__seed": 7})
    ]
    assert specs[0] == specs[1] != specs[2]


def test_the_code_is_every_source_of_the_packages_that_a_rank_runs(tmp_path: Path) -> None:
    sources = {"pipeline/s3/a.py": b"1", "tokenization/b.py": b"2", "training/c.py": b"3"}
    for name, content in (sources | {"jobs/d.py": b"4", "training/e.so": b"5"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    lines = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sources.items()]
    before = code_digest(tmp_path)
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    (tmp_path / "training/c.py").write_bytes(b"3 ")
    assert code_digest(tmp_path) != before
