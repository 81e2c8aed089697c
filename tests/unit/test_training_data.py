"""Shard sets that do not fit a train spec's model, or each other, are refused with the field to set."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_shards import fingerprint_of, train_config, write_shard_set

from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError
from training.checkpoint import SetRecord, set_record
from training.data import open_shards
from training.ranks import Ranks
from training.validation import Validation


def test_all_sets_of_a_spec_are_opened_in_order(tmp_path: Path) -> None:
    sets = [write_shard_set(tmp_path / name, samples_per_shard=(n,)) for n, name in enumerate("abc", start=1)]
    parts = [{"shards": str(path), "weight": 1.0} for path in sets[:2]]
    config = train_config(
        tmp_path / "run", shards=sets[0], data={"mixture": parts}, validation={"shards": str(sets[2])}
    )
    shard_sets, held_out = open_shards(config)
    assert [shard_set.num_samples for shard_set in shard_sets] == [1, 2]
    assert held_out is not None
    assert held_out.num_samples == 3
    assert open_shards(train_config(tmp_path / "run", shards=sets[0]))[1] is None


READ_ALL = """
import resource, sys
import numpy as np
from pipeline.storage import ArtifactError
from training.config import TrainConfig
from training.data import open_shards
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[2])))
(shard_set,), _ = open_shards(TrainConfig.model_validate_json(sys.argv[1]))
try:
    labels_B = shard_set.read_batch(np.arange(300), views=np.zeros(300, dtype=np.int64))[1]
    print("read", len(labels_B))
except ArtifactError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("most_files", "said"),
    [
        (2000, r"^read 300$"),
        (256, r"Too many open files; raise ulimit -n or lower data\.shuffle_window_shards$"),
    ],
)
def test_a_run_opens_as_many_files_as_it_may_and_names_the_limit(tmp_path: Path, most_files: int, said: str) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(1,) * 300)
    config = train_config(tmp_path / "run", shards=shards, data__shuffle_window_shards=128)
    code = [sys.executable, "-c", READ_ALL, config.model_dump_json(), str(most_files)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert re.search(said, done.stdout), done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__codebook_size": 32}, r"model\.codebook_size must be that of the codes = 16, got 32; set model\.c"),
        ({"model__codes_per_side": 5}, r"model\.codes_per_side must be that of the codes = 4, got 5; set model\."),
    ],
)
def test_codes_of_another_shape_than_the_models_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shards = write_shard_set(tmp_path / "set")
    with pytest.raises(ArtifactError, match=message):
        open_shards(train_config(tmp_path / "run", shards=shards, **changes))


def test_held_out_codes_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    other = write_shard_set(tmp_path / "other", fingerprint=fingerprint_of("1" * 64))
    with pytest.raises(ArtifactError, match=r"open shard set .*/other: tokenizer fingerprint must be"):
        open_shards(train_config(tmp_path / "run", shards=shards, validation={"shards": str(other)}))


def test_a_set_is_told_by_its_samples_in_order_and_not_by_its_place(tmp_path: Path) -> None:
    def record(name: str, *sizes: int, first_sample: int = 0) -> SetRecord:
        path = write_shard_set(tmp_path / name, samples_per_shard=sizes, first_sample=first_sample)
        return set_record(ShardSet.open(str(path)).manifest)

    one = record("one", 4, 3)
    assert (one.num_samples, one.num_shards) == (7, 2)
    assert record("copy", 4, 3) == one
    assert len({one.sha256, record("grown", 4, 3, 2).sha256, record("other", 4, 3, first_sample=1).sha256}) == 3


def test_held_out_labels_that_the_model_lacks_are_refused_before_a_step(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    held_out = ShardSet.open(str(write_shard_set(tmp_path / "held_out", samples_per_shard=(6,), label=4)))
    config = train_config(tmp_path / "run", shards=shards, validation={"shards": str(tmp_path / "held_out")})
    one_rank = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(ArtifactError, match=r"read sample .*: labels must be below model.num_classes = 4, got 4"):
        Validation(held_out, config=config, ranks=one_rank)
