"""A warm start of many ranks: one of them reads the weights."""

from pathlib import Path

import pytest
import torch
from synthetic_runs import FINGERPRINT, config_of, model_of

from pipeline.config import S3Config
from pipeline.storage import ArtifactError
from training.loop import warm_start_on_first
from training.ranks import Ranks
from training.tensorar import build_model
from training.weights import save_model


def ranks_of(rank: int) -> Ranks:
    return Ranks(rank=rank, world_size=1, device=torch.device("cpu"))  # which tells nobody anything


def test_only_the_first_rank_reads_the_weights(tmp_path: Path) -> None:
    trained, path = model_of(window_size=4), tmp_path / "model.safetensors"
    save_model(path, trained.state_dict(), config=trained.config, fingerprint=FINGERPRINT, step=12)
    model = build_model(config_of(window_size=4))
    warm_start_on_first(model, str(path), s3=S3Config(), ranks=ranks_of(0))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    warm_start_on_first(model, str(tmp_path / "nowhere"), s3=S3Config(), ranks=ranks_of(1))
    with pytest.raises(ArtifactError, match="nowhere"):
        warm_start_on_first(model, str(tmp_path / "nowhere"), s3=S3Config(), ranks=ranks_of(0))
