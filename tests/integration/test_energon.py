"""Energon opens what the job wrote without a pass of its own, and what that pass would write says the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from interop_sets import make_gapped_set, tars_of, tokenized, written
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)


@edataclass
class CodesSample(Sample):
    codes: np.ndarray
    metadata: dict[str, Any]


@stateless
def cook(sample: dict[str, Any]) -> CodesSample:
    return CodesSample(**basic_sample_keys(sample), codes=sample["codes.npy"], metadata=sample["json"])


class CodesEncoder(DefaultTaskEncoder):
    """Passes codes and metadata on as they are."""

    cookers = (Cooker(cook),)

    @stateless
    def batch(self, samples: list[CodesSample]) -> list[CodesSample]:
        return samples


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("energon")


@pytest.fixture(scope="module")
def shard_set(root: Path) -> Path:
    return make_gapped_set(root)


@pytest.fixture(scope="module")
def prepared(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shards alone, prepared by Energon's own command."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "shards").mkdir()
    for tar in tars_of(shard_set):
        (root / "shards" / Path(tar).name).write_bytes(Path(tar).read_bytes())
    energon_prepare(root)
    return root


def test_prepare_writes_the_indexes_that_stand_beside_our_shards(shard_set: Path, prepared: Path) -> None:
    theirs = {path.name: path.read_bytes() for path in prepared.glob("shards/*.tar.idx")}
    assert theirs == {path.name: path.read_bytes() for path in shard_set.glob("shards/*.tar.idx")}
    assert sorted(theirs) == ["00000.tar.idx", "00001.tar.idx", "00003.tar.idx"]


@pytest.mark.parametrize("name", ["dataset.yaml", "split.yaml", ".info.json"])
def test_prepare_says_what_our_sidecars_say(shard_set: Path, prepared: Path, name: str) -> None:
    ours, theirs = ((root / ".nv-meta" / name).read_text() for root in (shard_set, prepared))
    assert yaml.safe_load(ours) == yaml.safe_load(theirs)


def test_prepare_takes_a_set_with_our_sidecars_and_leaves_its_shards(root: Path) -> None:
    urls = [f"{root}/tars/00000.tar", f"{root}/tars/00003.tar"]
    run_dir = tokenized(root, "prepared_too", {"kind": "webdataset", "urls": urls})
    before = {path: path.read_bytes() for path in run_dir.glob("shards/*")}
    energon_prepare(run_dir, "--force-overwrite")
    assert {path: path.read_bytes() for path in run_dir.glob("shards/*")} == before
    assert (run_dir / ".nv-meta" / "index.sqlite").is_file()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_its_loader_reads_each_sample_once_without_prepare(shard_set: Path, num_workers: int) -> None:
    assert not (shard_set / ".nv-meta" / "index.sqlite").exists()
    dataset = get_val_dataset(
        shard_set,
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=num_workers),
        batch_size=4,
        task_encoder=CodesEncoder(),
    )
    samples = [sample for batch in get_loader(dataset) for sample in batch]
    read = {sample.__key__: (sample.codes.tolist(), sample.metadata) for sample in samples}
    assert len(samples) == 18
    assert read == written(shard_set)


def test_its_training_loader_resumes_within_an_epoch(shard_set: Path) -> None:
    def loader() -> Any:
        dataset = get_train_dataset(
            shard_set,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=3,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=CodesEncoder(),
        )
        return get_savable_loader(dataset)

    first = loader()
    batches = iter(first)
    begun = [sample.__key__ for _ in range(2) for sample in next(batches)]
    state = first.save_state_rank()
    rest = [sample.__key__ for _ in range(4) for sample in next(batches)]
    assert sorted(begun + rest) == list(written(shard_set))
    second = loader()
    second.restore_state_rank(state)
    batches = iter(second)
    assert [sample.__key__ for _ in range(4) for sample in next(batches)] == rest


def energon_prepare(root: Path, *flags: str) -> None:
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(root), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1", "--no-progress"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
