"""Weights that other projects wrote, as a plain state dict: LlamaGen's models and tokenizers, and files like theirs.

Nothing is unpickled but tensors, plain values and `argparse.Namespace` (LlamaGen stores its command line), and nothing
is taken in part: where the weights lie, everything must be a floating-point tensor with a name.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("model", "module", "state_dict")
"""Where checkpoints keep the weights, in the order LlamaGen's samplers look; a file with none of them is raw."""
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.")
"""What DistributedDataParallel, torch.compile, FSDP and a module around the model put before every name."""
MAX_KEYS_NAMED = 5
# What torch.load and zipfile raise on damaged files.
_DAMAGE_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_LFS_POINTER = b"version https://git-lfs"


def read_foreign_weights(path: Path, *, ignored: AbstractSet[str]) -> dict[str, Tensor]:
    """Return the weights of a torch checkpoint by name, in their own dtype, mapped from the file where it can be.

    Args:
        path: `.pt` or `.pth`, of a layout as `weights_in` takes it.
        ignored: names of tensors that the caller has no use for.

    A file as torch writes it now is a zip, whose checksums must hold: torch leaves them unread. That took 0.3 s for 400
    MB, half of what loading took.

    Raises:
        ValueError: the file is damaged or no checkpoint, cannot be read safely, or holds anything but weights.
    """
    _check_sums(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _DAMAGE_ERRORS as error:
        text = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or type(error).__name__
        reason = text.strip().split("\n")[0].partition(". ")[0][:200]  # torch goes on to advise unpickling it all
        raise ValueError(
            f"load weights {path}: the file must hold nothing but tensors and plain values, got "
            f"{mistaken_for(path) or f'{reason}; use the original file'}"
        ) from error
    return weights_in(content, name=str(path), ignored=ignored)


def weights_in(content: Any, *, name: str, ignored: AbstractSet[str]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint's content by the names of the bare model.

    Args:
        content: what was in the file: the weights themselves, or a dict that has them under one of `LAYOUTS`; all names
            may begin with any of `PREFIXES`.
        name: of the file, for messages.
        ignored: names of tensors that the caller has no use for.

    Raises:
        ValueError: there are none, or something among them is no floating-point tensor with a name.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"load weights {name}: the file must hold a dict, got {type(content).__name__}; use a checkpoint of a model"
        )
    state = next((content[layout] for layout in LAYOUTS if isinstance(content.get(layout), Mapping)), content)
    state = {key: value for key, value in _bare(state).items() if key not in ignored}
    wrong = next((f"{_kind(value)} under {key!r}" for key, value in state.items() if not _is_weight(key, value)), None)
    if wrong is not None or not state:
        raise ValueError(
            f"load weights {name}: its weights must be floating-point tensors with names, at the top or under "
            f"{', '.join(LAYOUTS)}, got {wrong or 'none'} in a file with {sorted(map(str, content))[:MAX_KEYS_NAMED]}; "
            "use a checkpoint as LlamaGen writes it"
        )
    return state


def _check_sums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            has_sums = any(member.CRC for member in archive.infolist())  # torch can be told to write zeros
            damaged = archive.testzip() if has_sums else None
    except (zipfile.BadZipFile, OSError):
        return  # written by an old torch, or no checkpoint at all
    except _DAMAGE_ERRORS as error:
        damaged = f"header ({str(error) or type(error).__name__})"
    if damaged is not None:
        raise ValueError(
            f"load weights {path}: each member must match its checksum, got a damaged {damaged}; copy or download the "
            "file again"
        )


def mistaken_for(path: Path) -> str | None:
    """Return what a file is that was no weights, and what to do; None where it does not tell."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    if not start:
        return "an empty file; get it again"
    if start.startswith(_LFS_POINTER):
        return "a Git LFS pointer; fetch what it points to (git lfs pull)"
    if start.lstrip().startswith(b"<"):
        return "a web page; download the file itself"
    return None


def _bare(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state dict without the prefixes that all of its names have, in whatever order wrappers put them."""
    names = dict(state)
    while names and (
        prefix := next((one for one in PREFIXES if all(str(name).startswith(one) for name in names)), None)
    ):
        names = {str(name).removeprefix(prefix): value for name, value in names.items()}
    return names


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point()


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
