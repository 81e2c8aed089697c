"""What the pool makes of a storage that fails, and of workers that write where their job does not look."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from toy_corpus import tokenize_config, write_tars, write_tiny_tokenizer

from pipeline import pool as pool_module
from pipeline import tokenize
from pipeline.cluster import ray_session
from pipeline.config import TokenizeConfig
from pipeline.ledger import read_record
from pipeline.pool import Poison, PoolState, WorkerPool
from pipeline.sources.plan import WorkUnit
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError, StorageUnavailableError, open_storage
from pipeline.tokenize import run_tokenize
from pipeline.worker import Finished, UnitTokenizer
from tokenization.tokenizer import Tokenizer

OUTAGE = StorageUnavailableError("read s3://b/a: must succeed within s3.max_attempts = 8 attempts, got 503")


@pytest.fixture
def config(tmp_path: Path) -> TokenizeConfig:
    weights = write_tiny_tokenizer(tmp_path / "tiny.safetensors")
    source = {"kind": "webdataset", "urls": [write_tars(tmp_path / "tars", num_tars=3)]}
    fields: dict[str, Any] = {"max_attempts": 2, "max_poison_units": 9, "cluster": {"num_workers": 2}}
    return tokenize_config(tmp_path / "set", source=source, weights=weights, **fields)


@pytest.fixture
def units(config: TokenizeConfig) -> tuple[WorkUnit, ...]:
    return make_source(config.source, s3=config.s3).plan().units


@pytest.fixture
def pool(config: TokenizeConfig) -> WorkerPool:
    return WorkerPool(config, keys=make_source(config.source, s3=config.s3).plan().keys, fingerprint_digest="")


def test_a_storage_that_fails_every_unit_ends_the_job_and_sets_none_aside(
    pool: WorkerPool, units: tuple[WorkUnit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: 100.0)
    pool._waiting.extend(units[1:])
    waits = []
    for unit in (units[0], units[1], units[0]):
        assert list(pool._retry_later(unit, OUTAGE)) == []
        waits.append(pool._paused_until_s)
    assert waits == [0.0, 105.0, 110.0]
    with pytest.raises(StorageUnavailableError, match="got 503"):  # two attempts of two workers
        list(pool._retry_later(units[1], OUTAGE))


def test_an_object_that_its_storage_alone_never_gives_is_set_aside(
    pool: WorkerPool, units: tuple[WorkUnit, ...]
) -> None:
    pool._waiting.extend(units[1:])
    assert list(pool._retry_later(units[0], OUTAGE)) == []
    pool._outages_in_a_row = 0  # another unit was finished in between
    (given_up,) = pool._retry_later(units[0], OUTAGE)
    assert isinstance(given_up, Poison)
    assert len(given_up.problems) == 2
    pool._waiting.clear()
    assert list(pool._retry_later(units[1], OUTAGE)) == []
    pool._waiting.clear()
    (last,) = pool._retry_later(units[1], OUTAGE)  # nothing else is left to tell an outage from it
    assert last.unit == units[1]


def test_a_last_unit_is_not_tried_three_times_in_a_breath(
    pool: WorkerPool, config: TokenizeConfig, units: tuple[WorkUnit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: 100.0)
    pool._config = config.model_copy(update={"max_attempts": 3})
    waits = []
    for _ in range(2):
        assert list(pool._retry_later(units[0], OUTAGE)) == []
        pool._waiting.clear()
        waits.append(pool._paused_until_s)
    assert waits == [105.0, 105.0]


def test_workers_are_asked_by_the_clock_and_not_for_every_unit_that_is_finished(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = (write_tars(tmp_path / "many", num_tars=12, samples_per_tar=1),)
    plan = make_source(config.source.model_copy(update={"urls": urls}), s3=config.s3).plan()
    digest = Tokenizer.load(config.tokenizer).fingerprint.digest
    monkeypatch.setattr(pool_module, "POLL_INTERVAL_S", 600.0)
    pool = WorkerPool(config, keys=plan.keys, fingerprint_digest=digest)
    with ray_session(config.cluster):
        kinds = Counter(type(event) for event in pool.run(plan.units))
    assert kinds == {Finished: 12, PoolState: 1}  # the last one, that nothing is in flight


def test_relative_paths_of_a_spec_start_from_the_jobs_directory(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    relative = config.model_copy(
        update={
            "run_dir": "set",
            "source": config.source.model_copy(update={"urls": ("tars/{00000..00002}.tar",)}),
            "tokenizer": config.tokenizer.model_copy(update={"weights": "tiny.safetensors"}),
        }
    )
    monkeypatch.chdir(tmp_path)
    plan = make_source(relative.source, s3=relative.s3).plan()
    digest = Tokenizer.load(relative.tokenizer).fingerprint.digest
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a node was joined to the cluster
    worker = UnitTokenizer(relative, keys=plan.keys, fingerprint_digest=digest, directory=str(tmp_path))
    worker.run(plan.units[0])
    assert read_record(open_storage(str(tmp_path / "set")), "00000").counts.num_written == 10
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_job_that_does_not_see_what_its_workers_write_is_told(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "MAX_INVISIBLE_S", 0.0)

    class Elsewhere(UnitTokenizer):
        """A worker on a machine that has another disk there."""

        def __init__(self, config: TokenizeConfig, **arguments: Any) -> None:
            there = config.model_copy(update={"run_dir": str(tmp_path / "other")})
            super().__init__(there, **arguments)

    monkeypatch.setattr(pool_module, "UnitTokenizer", Elsewhere)
    with pytest.raises(ArtifactError, match=r"must be seen by the job, got nothing of unit \d .* every machine mounts"):
        run_tokenize(config, progress=False)
