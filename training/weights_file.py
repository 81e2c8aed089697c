"""A file of weights, ours or LlamaGen's, on a disk or on S3.

Ours is a safetensors of float32 tensors with one metadata entry, `tensorar`: the JSON of `ModelHeader`. Invariant: what
is read of it is what was written, as the header holds the hash of the values. The header of a file on S3 costs two
ranged reads; its tensors are read from a copy below TMPDIR, one for each process that reads, gone afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import S3Config
from pipeline.s3.staging import staging_directory
from pipeline.storage import S3_SCHEME, ArtifactError, Storage, open_storage, raise_full, split_url
from tokenization.config import Config
from tokenization.fingerprint import Fingerprint
from tokenization.messages import reason_of
from tokenization.weights_file import hash_weights
from training.config import ModelConfig

HEADER_KEY = "tensorar"
HEADER_VERSION = 1
OUR_SUFFIX = ".safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""What safetensors allows."""
_BLOCK_BYTES = 8 << 20

logger = logging.getLogger(__name__)


class ModelHeader(Config):
    """What our weights file says about itself."""

    version: int = HEADER_VERSION
    config: ModelConfig
    fingerprint: Fingerprint | None
    """Tokenizer of the codes trained on; none where it is not known."""
    step: int
    """Training steps behind the weights."""
    weights_sha256: str | None = None
    """Over names, shapes and values, `hash_weights`; none in a file of before."""


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file that `find_weights` found."""

    url: str
    """Path or `s3://` URL."""
    s3: S3Config

    @property
    def is_ours(self) -> bool:
        """Whether it is to be a safetensors file of ours; else it is LlamaGen's."""
        return self.url.endswith(OUR_SUFFIX)

    def exists(self) -> bool:
        """Whether there is such a file."""
        if not self._is_remote:
            return Path(self.url).is_file()
        if "/" not in self.url.removeprefix(S3_SCHEME):
            return False  # a bucket
        storage, name = self._place
        return storage.find(name) is not None

    def read_header(self) -> ModelHeader:
        """Return what our file says about itself; raises as `read_header` does."""
        if not self._is_remote:
            return read_header(Path(self.url))
        storage, name = self._place
        with staging_directory() as directory, self._copied_to(directory / name) as path:
            with storage.open(name) as source:
                length = source.read(_LENGTH_BYTES)
                path.write_bytes(length + source.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES)))
                num_bytes = source.seek(0, os.SEEK_END)
            os.truncate(path, num_bytes)  # tensors that nobody looks at are a hole
            return read_header(path)

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Yield the path of the file, or of a copy of it; an `ArtifactError` of the body names the file itself."""
        if not self._is_remote:
            yield Path(self.url)
            return
        storage, name = self._place
        with staging_directory() as directory, self._copied_to(directory / name) as path:
            logger.info("download weights=%s to=%s", self.url, path)
            with storage.open(name) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, _BLOCK_BYTES)
            yield path

    @property
    def _is_remote(self) -> bool:
        return self.url.startswith(S3_SCHEME)

    @property
    def _place(self) -> tuple[Storage, str]:
        directory, name = split_url(self.url)
        return open_storage(directory, s3=self.s3), name

    @contextlib.contextmanager
    def _copied_to(self, path: Path) -> Iterator[Path]:
        """Yield the path of a copy; errors of the body name the file itself, and TMPDIR where it is full."""
        try:
            yield path
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(path), self.url)) from error
        except OSError as error:
            action = "free some space there or set TMPDIR to a larger disk; each process that reads weights has a copy"
            raise_full(error, doing=f"read weights {self.url} to {path}", action=action)
            raise


def write_weights(path: Path, state: Mapping[str, Tensor], *, header: ModelHeader) -> None:
    """Write a file of ours, float32, its hash added to the header; the same state gives the same bytes.

    Args:
        path: where to; neither fsynced nor staged.
        state: tensors of any float dtype and device.
        header: what the file shall say about itself.
    """
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    header = header.model_copy(update={"weights_sha256": hash_weights(tensors)})
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={HEADER_KEY: header.model_dump_json()})
    path.chmod(mode)  # as the umask has it: safetensors gives its own file to its owner alone


def read_header(path: Path) -> ModelHeader:
    """Return what our weights file says about itself.

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
            f"read weights {path}: metadata must hold {HEADER_KEY!r}, got none; use a file that a train job "
            "wrote, or LlamaGen's own .pt"
        )
    try:
        values = json.loads(text)
        version = values.get("version") if isinstance(values, dict) else None
        if version != HEADER_VERSION:
            raise ValueError(f"version {version!r}")
        return ModelHeader.model_validate(values)
    except ValueError as error:  # pydantic's included
        raise ArtifactError(
            f"read weights {path}: metadata {HEADER_KEY!r} must be a version {HEADER_VERSION} header, got "
            f"{reason_of(error)}; install the tensorar that wrote the file, or write it anew"
        ) from error


def read_weights(path: Path) -> tuple[ModelHeader, dict[str, Tensor]]:
    """Return header and tensors of a file of ours, which match its hash where it has one.

    Raises:
        ArtifactError: it is damaged, not ours, or of another version.
    """
    header = read_header(path)
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"load weights {path}: the file is damaged ({error}); use another checkpoint") from error
    found = None if header.weights_sha256 is None else hash_weights(state)
    if found != header.weights_sha256:
        raise ArtifactError(
            f"load weights {path}: sha256 of the values must be {header.weights_sha256}, got {found}; the file is "
            "damaged, copy or export it again"
        )
    return header, state
