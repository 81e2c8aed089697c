"""LlamaGen's own checkpoints of models: its three layouts in, its DDP layout out.

The keys are LlamaGen's, so what `save_base_weights` writes goes into LlamaGen's own `load_state_dict` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import S3Config
from pipeline.storage import ArtifactError, open_storage, split_url
from tokenization.foreign_weights import read_foreign_weights, weights_in
from training.tensorar import BASE

TOLERATED_KEYS = frozenset({"freqs_cis"})
"""In some old checkpoints; a table that we compute."""
TEXT_KEYS = ("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")
"""How the keys begin that LlamaGen's text-conditional models have where ours embed a class."""
NUM_KEYS_SHOWN = 4


def load_base_weights(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """LlamaGen's weights as a plain state dict with LlamaGen's keys.

    Args:
        source: a checkpoint file (`.pt`, `.pth`) or the dict that was in it; the weights may lie under `model`,
            `module` or `state_dict`, or be the file itself.

    Raises:
        ArtifactError: the file cannot be read safely, or holds no weights.
    """
    name = "a dict" if isinstance(source, Mapping) else str(source)
    try:
        if isinstance(source, Mapping):
            state = weights_in(source, name=name, ignored=TOLERATED_KEYS)
        else:
            state = read_foreign_weights(Path(source), ignored=TOLERATED_KEYS)
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    text = [key for key in state if key.startswith(TEXT_KEYS)]
    if text:
        raise ArtifactError(
            f"load weights {name}: the model must be class-conditional, got a text-conditional one (it has {text[0]}); "
            "use one of LlamaGen's c2i checkpoints"
        )
    return state


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
