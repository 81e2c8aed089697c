"""LlamaGen's own checkpoints: its three layouts in, its DDP layout out.

Nothing is unpickled but tensors and plain values. The keys are LlamaGen's, so what `save_base_weights` writes goes into
LlamaGen's own `load_state_dict` as it is.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import S3Config
from pipeline.storage import ArtifactError, open_storage, split_url
from tokenization.weights_file import unreadable_reason

LAYOUTS = ("model", "module", "state_dict")
"""Where LlamaGen's checkpoints keep the weights, in the order its samplers look; a file with none of them is raw."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""
TOLERATED_KEYS = frozenset({"freqs_cis"})
"""In some old checkpoints; a table that we compute."""
BASE = "base."
"""What we put before LlamaGen's keys in a `TensorAR`."""
NUM_KEYS_SHOWN = 4


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
            f"{some(sorted(map(str, loaded)))}; use a LlamaGen checkpoint"
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


def save_base_weights(
    path: str | Path,
    model_state: Mapping[str, Tensor],
    *,
    step: int,
    s3: S3Config = S3Config(),  # noqa: B008  (frozen)
) -> int:
    """Commit the base model of a `TensorAR` as LlamaGen's DDP training writes it; return how many keys it has.

    The file is `{"model": state dict, "steps": step}`, float32; it loads with `weights_only=True`.

    Args:
        path: path or `s3://` URL of the `.pt` to write; an older one is replaced.
        model_state: of a `TensorAR`; what is not of its base model is left out.
        step: training steps behind it.
        s3: how S3 is reached.
    """
    state = {
        key.removeprefix(BASE): value.detach().to("cpu", torch.float32).clone()
        for key, value in model_state.items()
        if key.startswith(BASE)
    }
    directory, name = split_url(str(path))
    with open_storage(directory, s3=s3).stage(name) as staged_path:
        torch.save({"model": state, "steps": step}, staged_path)
    return len(state)


def some(keys: list[str]) -> str:
    """Return the first few keys, for a message."""
    shown = ", ".join(keys[:NUM_KEYS_SHOWN])
    return shown if len(keys) <= NUM_KEYS_SHOWN else f"{shown}, ..."
