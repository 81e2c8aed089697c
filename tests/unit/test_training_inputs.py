"""What is wrong with a training run's inputs is told by the launching process, before Ray or a rank is started."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
from synthetic_shards import fingerprint_of, train_config, write_shard_set

from jobs.inputs import check_inputs
from jobs.launch import launch_training
from pipeline.storage import ArtifactError
from tokenization.fingerprint import Fingerprint
from training.config import TrainConfig
from training.tensorar import build_model
from training.weights import save_model


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shard_set(tmp_path / "set")


def weights_of(config: TrainConfig, path: Path, *, fingerprint: Fingerprint | None = None) -> Path:
    save_model(path, build_model(config.model).state_dict(), config=config.model, fingerprint=fingerprint, step=0)
    return path


def refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        launch_training(config, progress=False)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__shards": "nowhere"}, "nowhere"),
        ({"model__codebook_size": 32}, "model.codebook_size must be that of the codes = 16, got 32"),
        ({"model__codes_per_side": 8}, "model.codes_per_side must be that of the codes = 4, got 8"),
        ({"validation": {"shards": "nowhere"}}, "nowhere"),
        ({"warm_start": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_at_once(
    shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    refused(train_config(tmp_path / "run", shards=shards, **changes), message)


def test_a_held_out_set_of_another_tokenizer_is_refused_at_once(shards: Path, tmp_path: Path) -> None:
    other = write_shard_set(tmp_path / "other", fingerprint=fingerprint_of("1" * 64))
    refused(train_config(tmp_path / "run", shards=shards, validation={"shards": str(other)}), "tokenizer")


def test_weights_of_another_model_are_refused_at_once(shards: Path, tmp_path: Path) -> None:
    wide = train_config(tmp_path / "wide", shards=shards, model__model_dim=64)
    weights = weights_of(wide, tmp_path / "wide.safetensors")
    config = train_config(tmp_path / "run", shards=shards, warm_start=str(weights))
    refused(
        config, "these differ: dim (there 64, in the spec 32), hidden width of the modules (there 8, in the spec 4)"
    )


def warm_started(config: TrainConfig, weights: Path, *, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is warned of when its inputs are checked."""
    engine = config.engine.model_copy(update={"ops": "reference"})
    with caplog.at_level("WARNING"):
        check_inputs(config.model_copy(update={"warm_start": str(weights), "engine": engine}), is_new=True)
    return [line.getMessage() for line in caplog.records if line.name == "jobs.inputs"]


def test_a_warm_start_from_another_tokenizers_codes_is_told_with_both_digests(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, other = train_config(tmp_path / "run", shards=shards), fingerprint_of("1" * 64)
    (line,) = warm_started(config, weights_of(config, tmp_path / "a.safetensors", fingerprint=other), caplog=caplog)
    assert (
        f"tokenizer {fingerprint_of().digest} (weights 00000000..), got those of {other.digest} (weights 1111" in line
    )


def test_a_warm_start_from_codes_that_mean_the_same_is_not_worth_a_word(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = train_config(tmp_path / "run", shards=shards)
    rounded = fingerprint_of().model_copy(update={"dtype": "bfloat16", "batch_size": 64})
    for name, fingerprint in (("a", rounded), ("b", None)):
        weights = weights_of(config, tmp_path / f"{name}.safetensors", fingerprint=fingerprint)
        assert warm_started(config, weights, caplog=caplog) == []
