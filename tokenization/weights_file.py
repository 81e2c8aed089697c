"""Tokenizer weights on disk: ours (safetensors with the network's shape inside) and LlamaGen's `.pt` (key `model`).

Nothing is unpickled (`weights_only=True`) and nothing is loaded in part: a missing, unexpected or misshapen weight
is an error that names it. Values are widened to float32 on loading, and their hash is taken then, so it does not depend
on the file format; ours carry it in their metadata and are checked against it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenization.config import NETWORKS, VQConfig
from tokenization.vq import VQNetwork

SHIPPED_DIR = Path(__file__).parent / "weights"
FORMAT_KEY = "tensorar-tokenizer"
"""The one metadata key of our files; its value is JSON. (With several, safetensors writes them in changing order.)"""
FORMAT_VERSION = 1
HISTORY_KEY = "quantize.codebook_used"
"""LlamaGen's record of recently used codes: in its files, absent from ours, no part of what the network computes."""


@dataclass(frozen=True)
class TokenizerWeights:
    """Weights as read from a file, with what the file says about them."""

    network: VQConfig
    """Shape of the network."""
    state: dict[str, Tensor]
    """Name to float32 value, without LlamaGen's record of used codes."""
    metadata: dict[str, Any]
    """What our files say about themselves (network, sha256, how they were fitted); empty for other files."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the values, `hash_weights`."""
        return hash_weights(self.state)


def hash_weights(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over sorted names, shapes and float32 little-endian values, the used-codes record left out."""
    digest = hashlib.sha256()
    for name in sorted(state.keys() - {HISTORY_KEY}):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def shipped_names() -> list[str]:
    """Return the names of the weights that ship with the package, sorted."""
    return sorted(path.stem for path in SHIPPED_DIR.glob("*.safetensors"))


def resolve_weights(name: str) -> Path:
    """Return the file behind a shipped name or a path.

    Raises:
        FileNotFoundError: it is neither.
    """
    shipped = SHIPPED_DIR / f"{name}.safetensors"
    path = shipped if name in shipped_names() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"loading tokenizer {name}: weights must be a file or a shipped name ({', '.join(shipped_names())}), "
            f"got neither; give the path of a .safetensors or LlamaGen .pt file"
        )
    return path


def write_weights(path: Path, *, network: VQConfig, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Commit a weights file of ours: staged beside its place, synced, renamed; the same input gives the same bytes.

    Args:
        path: where it appears, `.safetensors`.
        network: shape of the network.
        state: the weights in the dtype to store; the used-codes record is left out.
        metadata: more about the weights; goes into the file's JSON.
    """
    metadata = {
        "format_version": FORMAT_VERSION,
        "network": network.model_dump(mode="json"),
        "weights_sha256": hash_weights(state),
        **metadata,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if name != HISTORY_KEY}
    staged = path.with_name(f".staged-{path.name}")
    with staged.open("wb") as file:
        file.write(save(tensors, metadata={FORMAT_KEY: json.dumps(metadata, sort_keys=True)}))
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_weights(path: Path, *, network: str | None = None) -> TokenizerWeights:
    """Return the weights of a file, checked to be whole and to fit their network.

    Args:
        path: ours (`.safetensors`), or LlamaGen's (`.pt`, weights under the key `model`).
        network: `vq16` or `vq8`, the shape of a file that does not carry its own.

    Raises:
        ValueError: the file is damaged, of another kind, or does not fit the network.
    """
    if path.suffix == ".safetensors":
        weights = _read_safetensors(path, network=network)
    else:
        weights = _read_pickled(path, network=network)
    _check_fits(path, weights)
    recorded = weights.metadata.get("weights_sha256")
    if recorded is not None and weights.sha256 != recorded:
        raise ValueError(
            f"loading tokenizer {path}: sha256 of the weights must be {recorded}, got {weights.sha256}; "
            "the file is damaged, get it again"
        )
    return weights


def _read_safetensors(path: Path, *, network: str | None) -> TokenizerWeights:
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(FORMAT_KEY)
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"loading tokenizer {path}: the file must be whole safetensors, got {error}; get it again"
        ) from error
    if description is None:
        return TokenizerWeights(_named_network(path, network), _without_history(state), {})
    metadata = json.loads(description)
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise ValueError(
            f"loading tokenizer {path}: format_version must be {FORMAT_VERSION}, got {version!r}; "
            "use the tensorar that wrote the file"
        )
    shape = VQConfig.model_validate(metadata["network"])
    if network is not None and NETWORKS[network] != shape:
        raise ValueError(
            f"loading tokenizer {path}: the file carries its own network, got another one, {network!r}; "
            "leave network out"
        )
    return TokenizerWeights(shape, _without_history(state), metadata)


def _read_pickled(path: Path, *, network: str | None) -> TokenizerWeights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"loading tokenizer {path}: the file must hold nothing but tensors and plain values, got "
            f"{unreadable_reason(error)!r}; "
            "use LlamaGen's vq_ds16_c2i.pt or a safetensors file"
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"loading tokenizer {path}: the weights must lie under the key 'model', got {found!r}; "
            "use a file as LlamaGen publishes it"
        )
    state = {name: value.float() for name, value in state.items()}
    return TokenizerWeights(_named_network(path, network), _without_history(state), {})


def unreadable_reason(error: Exception) -> str:
    """Return why torch could not load a file, in one line without its advice to unpickle whatever is in there."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return text.strip().split("\n")[0].partition(". ")[0][:200]


def _named_network(path: Path, network: str | None) -> VQConfig:
    if network is None:
        raise ValueError(
            f"loading tokenizer {path}: network is required for a file that does not carry its own, got none; "
            f"set tokenizer.network to one of {', '.join(NETWORKS)}"
        )
    return NETWORKS[network]


def _without_history(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != HISTORY_KEY}


def _check_fits(path: Path, weights: TokenizerWeights) -> None:
    # The meta device gives names and shapes without the memory.
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in VQNetwork(weights.network).state_dict().items()}
    wanted.pop(HISTORY_KEY)
    found = {name: tuple(value.shape) for name, value in weights.state.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {found[name]} instead of {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(
            f"loading tokenizer {path}: the weights must fit the network, got {shown}; "
            "choose the network that the file was made with"
        )
