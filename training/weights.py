"""Weights in and out: a training run, our own safetensors or LlamaGen's checkpoints in, our own safetensors out.

No key is ever skipped: a missing, unexpected or misshapen one is an error that names it, and so is a weight that is not
finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import S3Config
from pipeline.local_storage import local_path, sha256_of_file
from pipeline.storage import S3_SCHEME, ArtifactError, open_storage, split_url
from tokenization.fingerprint import Fingerprint
from tokenization.weights_file import not_finite
from training.config import ModelConfig
from training.llamagen import load_base_weights, some
from training.run_weights import RunCheckpoint, find_run_checkpoint
from training.tensorar import BASE, TensorAR, is_of_base
from training.weights_file import ModelHeader, WeightsFile, read_weights, write_weights

CONSOLIDATED = "consolidated.pth"
"""The weights in the folder that LlamaGen's FSDP training writes."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """Weights of ours that were read: a file's or a checkpoint's."""

    path: str
    """Path or URL."""
    sha256: str
    """Of the file, or of the checkpoint's record, which holds the hash of all its files."""
    config: ModelConfig
    fingerprint: Fingerprint | None
    step: int


def save_model(
    path: str | Path,
    model_state: Mapping[str, Tensor],
    *,
    config: ModelConfig,
    fingerprint: Fingerprint | None,
    step: int,
    s3: S3Config = S3Config(),  # noqa: B008  (frozen)
) -> None:
    """Commits a weights file; the same state gives the same bytes.

    Args:
        path: path or `s3://` URL of the `.safetensors` to write; an older one is replaced.
        model_state: state dict of a `TensorAR`, any float dtype and device; stored as float32.
        config: the model's.
        fingerprint: of the tokenizer whose codes it was trained on.
        step: training steps behind it.
        s3: how S3 is reached.

    Raises:
        ArtifactError: the state dict is not that of a model of `config`.
    """
    _check_keys(f"save weights {path}", expected=_expected_shapes(config), found=model_state)
    header = ModelHeader(config=config, fingerprint=fingerprint, step=step)
    directory, name = split_url(str(path))
    with open_storage(directory, s3=s3).stage(name) as staged_path:
        write_weights(staged_path, model_state, header=header)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = False,
    s3: S3Config = S3Config(),  # noqa: B008  (frozen)
) -> tuple[TensorAR, ModelFile]:
    """A model in evaluation mode and what was read for it.

    Args:
        path: a training run (its newest whole checkpoint; may be an `s3://` URL), one of its checkpoints, or our
            `.safetensors`.
        device: where the model goes.
        dtype: what it computes in.
        use_ema: whether to take a run's moving average of the weights.
        s3: how S3 is reached.

    Raises:
        ArtifactError: there is no such thing, it is damaged, it is not ours, or a weight is not finite.
    """
    place = find_weights(path, s3=s3)
    if isinstance(place, RunCheckpoint):
        header, state, sha256 = place.header, place.read_weights(use_ema=use_ema), place.record.record_sha256
    else:
        _refuse_ema(place, use_ema=use_ema)
        with place.on_disk() as local:
            (header, state), sha256 = read_weights(local), sha256_of_file(local)
        # Copies in aligned memory: a mapped file's tensors start anywhere, and products round by their alignment.
        state = {name: value.clone() for name, value in state.items()}
    _check_keys(f"load weights {place.url}", expected=_expected_shapes(header.config), found=state)
    _check_finite(f"load weights {place.url}", state)
    with torch.device("meta"):
        model = TensorAR(header.config)
    model.load_state_dict(state, assign=True)
    model_file = ModelFile(
        path=place.url, sha256=sha256, config=header.config, fingerprint=header.fingerprint, step=header.step
    )
    return model.to(device=device, dtype=dtype).eval(), model_file


def find_weights(path: str | Path, *, s3: S3Config = S3Config()) -> WeightsFile | RunCheckpoint:  # noqa: B008  (frozen)
    """The weights file, or the checkpoint of a run, that `path` stands for.

    Args:
        path: a weights file, a training run directory, one of its checkpoints, or LlamaGen's FSDP folder; all may be
            `s3://` URLs.
        s3: how S3 is reached.

    Raises:
        ArtifactError: there is none.
    """
    is_remote = str(path).startswith(S3_SCHEME)
    place = str(path).rstrip("/") if is_remote else str(local_path(path))
    for url in (place, f"{place}/{CONSOLIDATED}"):
        file = WeightsFile(url=url, s3=s3)
        if file.exists():
            return file
    is_there = is_remote or Path(place).is_dir()
    checkpoint = find_run_checkpoint(place, s3=s3) if is_there else None
    if checkpoint is None:
        raise ArtifactError(
            f"find weights {path}: it must be a weights file or a run directory with a whole checkpoint, got "
            f"{'a directory without one' if is_there else 'nothing there'}; check the path or run the train job"
        )
    return checkpoint


def digest_of(place: WeightsFile | RunCheckpoint) -> str:
    """The sha256 that tells weights from others: of the file, or of a checkpoint's record."""
    if isinstance(place, RunCheckpoint):
        return place.record.record_sha256
    with place.on_disk() as local:
        return sha256_of_file(local)


def warm_start(
    model: TensorAR,
    path: str | Path,
    *,
    s3: S3Config = S3Config(),  # noqa: B008  (frozen)
) -> None:
    """Copies weights into a fresh model, before training begins.

    The base model alone (LlamaGen's, or ours of window_size 1) leaves exactly the TensorAR modules untouched.

    Args:
        model: of any window_size; overwritten in place.
        path: a training run directory, our `.safetensors`, or a LlamaGen checkpoint.
        s3: how S3 is reached.

    Raises:
        ArtifactError: nothing is there, it is damaged, the weights do not fit the model, or one is not finite.
    """
    place = find_weights(path, s3=s3)
    state = place.read_weights() if isinstance(place, RunCheckpoint) else _read_file(place)
    fresh = {}
    if all(map(is_of_base, state)):
        fresh = {key: value for key, value in model.state_dict().items() if not is_of_base(key)}
    _check_keys(f"warm start from {place.url}", expected=_expected_shapes(model.config), found=fresh | state)
    _check_finite(f"warm start from {place.url}", state)
    model.load_state_dict(fresh | state)


def _read_file(file: WeightsFile) -> dict[str, Tensor]:
    """The tensors of a file, LlamaGen's by the names that they have in a `TensorAR`."""
    with file.on_disk() as local:
        if file.is_ours:
            return read_weights(local)[1]
        return {BASE + key: value for key, value in load_base_weights(local).items()}


def _refuse_ema(file: WeightsFile, *, use_ema: bool) -> None:
    if use_ema:
        raise ArtifactError(
            f"load weights {file.url}: use_ema must be off for a file, which holds one set of weights, got on; name "
            "the run, or the file that tensorar export --ema wrote without use_ema"
        )


def _expected_shapes(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(TensorAR(config).state_dict())


def _check_finite(doing: str, state: dict[str, Tensor]) -> None:
    """Refuse weights that would sample the same code for ever."""
    broken = not_finite(state)
    if broken:
        raise ArtifactError(
            f"{doing}: every weight must be finite, got NaN or infinity in {len(broken)} tensors, {broken[0]} first; "
            "take an earlier checkpoint or another file"
        )


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
        listed = ", ".join(f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys)
        raise ArtifactError(
            f"{doing}: keys and shapes must be the model's, got {listed}; use weights of this size, "
            "num_classes, codebook_size and window_size, or set the model section to theirs"
        )
