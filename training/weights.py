"""Weights in and out: LlamaGen checkpoints and our own safetensors in, our own safetensors out.

Nothing is unpickled but tensors and plain values, and no key is ever skipped: a missing, unexpected or misshapen one is
an error that names it. Our file is a safetensors of float32 tensors with one metadata entry, `tensorar`: the JSON of
`ModelHeader` (version, model config, tokenizer fingerprint, step).
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.local_storage import local_path, sha256_of_file, stage
from pipeline.storage import ArtifactError
from tokenization.config import Config
from tokenization.fingerprint import Fingerprint
from tokenization.weights_file import unreadable_reason
from training.checkpoint import MODEL_FILE, newest_whole_checkpoint
from training.config import ModelConfig
from training.tensorar import TensorAR

HEADER_KEY = "tensorar"
HEADER_VERSION = 1
LAYOUTS = ("model", "module", "state_dict")
"""Where LlamaGen's checkpoints keep the weights, in the order its samplers look; a file with none of them is raw."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""
TOLERATED_KEYS = frozenset({"freqs_cis"})
"""In some old checkpoints; a table that we compute."""
BASE = "base."
NUM_KEYS_SHOWN = 4


class ModelHeader(Config):
    """What our weights file says about itself."""

    version: int = HEADER_VERSION
    config: ModelConfig
    fingerprint: Fingerprint | None
    """Tokenizer of the codes trained on; none where it is not known."""
    step: int
    """Training steps behind the weights."""


@dataclass(frozen=True)
class ModelFile:
    """A weights file of ours that was read."""

    path: Path
    sha256: str
    config: ModelConfig
    fingerprint: Fingerprint | None
    step: int


def save_model(
    path: Path,
    model_state: Mapping[str, Tensor],
    *,
    config: ModelConfig,
    fingerprint: Fingerprint | None,
    step: int,
) -> None:
    """Commits a weights file; the same state gives the same bytes.

    Args:
        path: the `.safetensors` to write; an older one is replaced.
        model_state: state dict of a `TensorAR`, any float dtype and device; stored as float32.
        config: the model's.
        fingerprint: of the tokenizer whose codes it was trained on.
        step: training steps behind it.

    Raises:
        ArtifactError: the state dict is not that of a model of `config`.
    """
    _check_keys(f"save weights {path}", expected=_expected_shapes(config), found=model_state)
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in model_state.items()}
    header = ModelHeader(config=config, fingerprint=fingerprint, step=step)
    with stage(path) as staged_path:
        save_file(tensors, staged_path, metadata={HEADER_KEY: header.model_dump_json()})


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[TensorAR, ModelFile]:
    """A model in evaluation mode and what its file says.

    Args:
        path: our `.safetensors`, a checkpoint directory, or a training run directory (its newest whole checkpoint).
        device: where the model goes.
        dtype: what it computes in.

    Raises:
        ArtifactError: there is no such file, it is damaged, or it is not ours.
    """
    file = find_weights(path)
    header = read_header(file)
    state = _read_tensors(file)
    _check_keys(f"load weights {file}", expected=_expected_shapes(header.config), found=state)
    with torch.device("meta"):
        model = TensorAR(header.config)
    # Copies in aligned memory: a mapped file's tensors start anywhere, and matrix products round by their alignment.
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    model_file = ModelFile(
        path=file,
        sha256=sha256_of_file(file),
        config=header.config,
        fingerprint=header.fingerprint,
        step=header.step,
    )
    return model.to(device=device, dtype=dtype).eval(), model_file


def find_weights(path: str | Path) -> Path:
    """The weights file that `path` stands for.

    Args:
        path: a weights file, a checkpoint directory, a training run directory, or LlamaGen's FSDP folder.

    Raises:
        ArtifactError: there is none.
    """
    place = local_path(path)
    if place.is_file():
        return place
    for name in (MODEL_FILE, "consolidated.pth"):
        if (place / name).is_file():
            return place / name
    checkpoint = newest_whole_checkpoint(place) if place.is_dir() else None
    if checkpoint is None:
        raise ArtifactError(
            f"find weights {place}: it must be a weights file or a run directory with a whole checkpoint, got "
            f"{'a directory without one' if place.is_dir() else 'nothing there'}; check the path or run the train job"
        )
    return checkpoint / MODEL_FILE


def read_header(path: Path) -> ModelHeader:
    """What our weights file says about itself.

    Raises:
        ArtifactError: it is damaged, not ours, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"read weights {path}: it must be a safetensors file, got {type(error).__name__}: {error}; "
            "use a run directory or a file that a train job wrote"
        ) from error
    if text is None:
        raise ArtifactError(
            f"read weights {path}: metadata must hold {HEADER_KEY!r}, got none; use a file that a train job wrote"
        )
    try:
        header = ModelHeader.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(
            f"read weights {path}: metadata {HEADER_KEY!r} must be a version {HEADER_VERSION} header, "
            f"got {error.error_count()} errors, the first: {error.errors()[0]['msg']}; write the file anew"
        ) from error
    if header.version != HEADER_VERSION:
        raise ArtifactError(
            f"read weights {path}: version must be {HEADER_VERSION}, got {header.version}; install a newer tensorar"
        )
    return header


def warm_start(model: TensorAR, path: str | Path) -> None:
    """Copies weights into a fresh model, before training begins.

    A file of the base model alone (LlamaGen's, or ours of window_size 1) leaves exactly the TensorAR modules untouched.

    Args:
        model: of any window_size; overwritten in place.
        path: a training run directory, our `.safetensors`, or a LlamaGen checkpoint.

    Raises:
        ArtifactError: nothing is there, or the weights do not fit the model.
    """
    file = find_weights(path)
    doing = f"warm start from {file}"
    if file.suffix != ".safetensors":
        state = {BASE + key: value for key, value in load_base_weights(file).items()}
    else:
        read_header(file)
        state = _read_tensors(file)
    fresh = {}
    if all(key.startswith(BASE) for key in state):
        fresh = {key: value for key, value in model.state_dict().items() if not key.startswith(BASE)}
    _check_keys(doing, expected=_expected_shapes(model.config), found=fresh | state)
    model.load_state_dict(fresh | state)


def load_base_weights(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """LlamaGen's weights as a plain state dict with LlamaGen's keys.

    Args:
        source: a checkpoint file (`.pt`, `.pth`) or the dict that was in it; the weights may lie under `model`,
            `module` or `state_dict`, or be the file itself.

    Raises:
        ArtifactError: the file cannot be read safely, or holds no weights.
    """
    loaded = source if isinstance(source, Mapping) else _read_pickle(Path(source))
    name = "a dict" if isinstance(source, Mapping) else str(source)
    state: Any = next((loaded[layout] for layout in LAYOUTS if isinstance(loaded.get(layout), Mapping)), loaded)
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in TOLERATED_KEYS}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtifactError(
            f"load weights {name}: it must hold tensors, itself or under {', '.join(LAYOUTS)}, got keys "
            f"{_some(sorted(map(str, loaded)))}; use a LlamaGen checkpoint"
        )
    return dict(state)


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen stores its command line
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ArtifactError(
            f"load weights {path}: it must be a torch checkpoint of tensors and plain values, got "
            f"{type(error).__name__}: {unreadable_reason(error)}; use the original file"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ArtifactError(
            f"load weights {path}: it must hold a dict, got {type(loaded).__name__}; use a LlamaGen checkpoint"
        )
    return loaded


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"load weights {path}: the file is damaged ({error}); use another checkpoint") from error
    return tensors


def _expected_shapes(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(TensorAR(config).state_dict())


def _check_keys(doing: str, *, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    misshapen = [
        f"{key} want {list(expected[key].shape)}, got {list(found[key].shape)}"
        for key in expected
        if key in found and expected[key].shape != found[key].shape
    ]
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": misshapen,
    }
    if any(problems.values()):
        listed = ", ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems.items() if keys)
        raise ArtifactError(
            f"{doing}: keys and shapes must be the model's, got {listed}; use weights of this size, "
            "num_classes, codebook_size and window_size, or set the model section to theirs"
        )


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:NUM_KEYS_SHOWN])
    return shown if len(keys) <= NUM_KEYS_SHOWN else f"{shown}, ..."
