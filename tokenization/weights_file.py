"""Tokenizer weights on disk: ours (safetensors with the network's shape inside) and LlamaGen's `.pt`.

Nothing is loaded in part: a missing, unexpected or misshapen weight, or one that is not finite, is an error that names
it. Values are widened to float32 on loading, and their hash is taken then, so it does not depend on the file format;
ours carry it in their metadata and are checked against it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenization.config import NETWORKS, VQConfig
from tokenization.foreign_weights import mistaken_for, read_foreign_weights, weights_in
from tokenization.messages import named, reason_of
from tokenization.synced import rename_synced, write_synced
from tokenization.vq import VQNetwork

SHIPPED_DIR = Path(__file__).parent / "weights"
FORMAT_KEY = "tensorar-tokenizer"
"""The one metadata key of our files; its value is JSON. (With several, safetensors writes them in changing order.)"""
FORMAT_VERSION = 1
MAX_NAMED_PROBLEMS = 3
HISTORY_KEY = "quantize.codebook_used"
"""LlamaGen's record of recently used codes: in its files, absent from ours, no part of what the network computes."""


class Header(BaseModel):
    """What every one of our files says about itself; there may be more."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format_version: Literal[1]
    network: VQConfig
    weights_sha256: str


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
    path = shipped if name in shipped_names() else Path(name).expanduser()
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
    write_synced(staged, save(tensors, metadata={FORMAT_KEY: json.dumps(metadata, sort_keys=True)}))
    rename_synced(staged, path)


def read_weights(path: Path, *, network: VQConfig | None = None) -> TokenizerWeights:
    """Return the weights of a file, checked to be whole, finite and to fit their network.

    Args:
        path: ours (`.safetensors`), or LlamaGen's (`.pt`, as it publishes them and as its training writes them; of the
            weights and their average those that its own code extraction takes, under the key `model`).
        network: the shape; required for a file that does not carry its own.

    Raises:
        ValueError: the file is damaged, of another kind, or does not fit the network.
    """
    if path.suffix == ".safetensors":
        weights = _read_safetensors(path, network=network)
    else:
        state = read_foreign_weights(path, ignored={HISTORY_KEY})
        weights = TokenizerWeights(_required(path, network), _widened(state), {})
    _check_fits(path, weights)
    broken = not_finite(weights.state)
    if broken:
        raise ValueError(
            f"loading tokenizer {path}: every weight must be finite, got NaN or infinity in {len(broken)} tensors, "
            f"{broken[0]} first; use other weights"
        )
    recorded = weights.metadata.get("weights_sha256")
    if recorded is not None and weights.sha256 != recorded:
        raise ValueError(
            f"loading tokenizer {path}: sha256 of the weights must be {recorded}, got {weights.sha256}; "
            "the file is damaged, get it again"
        )
    return weights


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Return the names of the weights that hold a NaN or an infinity, which would give every image the same codes."""
    return [name for name, value in state.items() if not value.isfinite().all()]


def _read_safetensors(path: Path, *, network: VQConfig | None) -> TokenizerWeights:
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(FORMAT_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"loading tokenizer {path}: the file must be whole safetensors, got "
            f"{mistaken_for(path) or f'{error}; get it again'}"
        ) from error
    state = _widened(weights_in(tensors, name=str(path), ignored={HISTORY_KEY}))
    if description is None:
        return TokenizerWeights(_required(path, network), state, {})
    try:
        header = Header.model_validate_json(description)
    except ValidationError as error:
        raise ValueError(
            f"loading tokenizer {path}: metadata {FORMAT_KEY!r} must be a version {FORMAT_VERSION} header, got "
            f"{reason_of(error)}; use the tensorar that wrote the file, or get it again"
        ) from error
    if network not in (None, header.network):
        raise ValueError(
            f"loading tokenizer {path}: its network must be the spec's, {network!r}, got its own, {header.network!r}; "
            "leave tokenizer.network out, or set network of a fit to that of the file"
        )
    return TokenizerWeights(header.network, state, json.loads(description))


def _required(path: Path, network: VQConfig | None) -> VQConfig:
    if network is None:
        raise ValueError(
            f"loading tokenizer {path}: network is required for a file that does not carry its own, got none; "
            f"set tokenizer.network to one of {', '.join(NETWORKS)}"
        )
    return network


def _widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in state.items()}


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
        shown = named(sorted(problems), most=MAX_NAMED_PROBLEMS)
        raise ValueError(
            f"loading tokenizer {path}: the weights must fit the network, got {shown}; "
            "choose the network that the file was made with"
        )
