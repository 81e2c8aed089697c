"""Tiny models and the weights of them that a run of two ranks leaves, without training anything."""

from pathlib import Path
from typing import Any

import torch

from pipeline.local_storage import LocalStorage
from tokenization.config import VQConfig
from tokenization.fingerprint import Fingerprint
from training.checkpoint import CheckpointRecord, FileRecord, commit_checkpoint, prepared_name
from training.config import ModelConfig
from training.fragment_file import FragmentLayout, write_fragments
from training.tensorar import TensorAR, build_model

FINGERPRINT = Fingerprint(
    weights_sha256="ab" * 32, network=VQConfig(codebook_size=24), image_size_px=24, batch_size=8, dtype="float32"
)


def config_of(**changes: Any) -> ModelConfig:
    fields = {"num_layers": 1, "num_heads": 2, "model_dim": 16, "codebook_size": 24, "codes_per_side": 3}
    return ModelConfig(**(fields | {"num_classes": 5} | changes))


def model_of(**changes: Any) -> TensorAR:
    model = build_model(config_of(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def write_run(run_dir: Path, model: TensorAR, *, step: int = 12) -> None:
    """A run of two ranks that each hold a part of every parameter; the average is the weights plus one."""
    storage = LocalStorage(run_dir)
    state = {name: value.detach().numpy().ravel() for name, value in model.state_dict().items()}
    files = []
    for rank in (0, 1):
        cuts = {name: (len(flat) * rank // 3, len(flat) * (rank + 1) // 3) for name, flat in state.items()}
        cuts = {name: (start, len(state[name]) if rank else end) for name, (start, end) in cuts.items() if start < end}
        layout = FragmentLayout(kinds=("weights", "ema"), fragments=cuts)
        weights = [state[name][start:end] for name, (start, end) in cuts.items()]
        name = f"rank_{rank:05d}.safetensors"
        with storage.stage(f"{prepared_name(storage, step)}/{name}") as staged_path:
            written = write_fragments(staged_path, layout, [*weights, *(values + 1 for values in weights)])
        files.append(FileRecord(name=name, num_bytes=written.num_bytes, sha256=written.sha256))
    record = CheckpointRecord(
        step=step,
        samples_consumed=0,
        optimizer_steps=step,
        world_size=2,
        zero_stage=2,
        kinds=("weights", "ema"),
        shapes={name: tuple(value.shape) for name, value in model.state_dict().items()},
        fingerprint=FINGERPRINT,
        spec={"model": model.config.model_dump(mode="json")},
        packages={},
        files=tuple(files),
    )
    commit_checkpoint(storage, record)
