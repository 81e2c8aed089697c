"""A sample job whose weights and results are on S3: the files of a local one, and a rerun does nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_corpus import write_tiny_tokenizer
from toy_evaluation import write_model

from jobs.run import run_spec
from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.config import TokenizerConfig
from tokenization.tokenizer import Tokenizer
from training.config import SampleConfig

OWN = ("samples.json", "spec.json", ".lock")
"""Files that name their place or hold times."""


def pictures_of(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read_bytes(name) for name in storage.list() if name not in OWN}


def result_of(storage: Storage) -> dict[str, Any]:
    result = json.loads(storage.read_bytes("samples.json"))
    return {name: result[name] for name in ("labels", "flip_rate", "calls_of_image", "tokenizer_fingerprint", "strip")}


def test_samples_on_s3_are_those_of_a_local_run(s3_url: str, tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(weights=str(write_tiny_tokenizer(tmp_path / "tiny.safetensors")), image_size_px=16)
    model = write_model(tmp_path / "model.safetensors", tokenizer=Tokenizer.load(tokenizer), window_size=3)
    open_storage(s3_url).write_bytes("model.safetensors", model.read_bytes())
    here = SampleConfig(
        kind="sample",
        run_dir=str(tmp_path / "here"),
        weights=str(model),
        tokenizer=tokenizer,
        labels=(0, 2),
        num_per_label=5,
        device="cpu",
    )
    there = here.model_copy(update={"run_dir": f"{s3_url}/samples", "weights": f"{s3_url}/model.safetensors"})
    assert run_spec(here) == here.run_dir
    assert run_spec(there) == there.run_dir
    storage = open_storage(there.run_dir)
    pictures = pictures_of(open_storage(here.run_dir))
    assert sum(name.startswith("images/") for name in pictures) == 10
    assert pictures_of(storage) == pictures
    assert result_of(storage) == result_of(open_storage(here.run_dir))

    files = storage.list()
    run_spec(there)
    assert storage.list() == files
    with pytest.raises(ArtifactError, match=rf"run {there.run_dir}: .* seed"):
        run_spec(there.model_copy(update={"seed": 1}))

    storage.remove("samples.json")  # as a kill before the end leaves it, of a spec with more samples
    storage.write_bytes("images/00010.png", b"")
    run_spec(there)
    assert pictures_of(storage) == pictures
