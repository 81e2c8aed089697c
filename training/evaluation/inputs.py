"""Everything that an evaluation reads, opened and checked against each other before anything is measured.

Invariant: model, control, tokenizer and shard sets belong together, or an error names the one that does not; the
digests say which inputs the committed stages come from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import S3Config
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError
from tokenization.tokenizer import Tokenizer
from training.evaluation.captions import check_embedder, read_class_captions
from training.evaluation.config import FREE_FIELDS, ControlConfig, EvaluateConfig
from training.evaluation.features import load_features
from training.evaluation.image_features import FeatureReader, TrainingImages, check_codes
from training.ops import check_ops
from training.sample import check_tokenizer, pick_device
from training.tensorar import TensorAR
from training.weights import ModelFile, digest_of, find_weights, load_model


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Weights in memory, and what they say of themselves."""

    model: TensorAR
    file: ModelFile

    def described(self) -> dict[str, Any]:
        """JSON values for the result."""
        config = self.file.config
        return {
            "path": self.file.path,
            "sha256": self.file.sha256,
            "step": self.file.step,
            "window_size": config.window_size,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an evaluation works with."""

    device: torch.device
    model: LoadedModel
    control: LoadedModel | None
    tokenizer: Tokenizer
    held_out: ShardSet
    training_images: TrainingImages | None
    reader: FeatureReader
    class_captions: tuple[str, ...] | None
    """None: there is no caption score."""
    digests: dict[str, Any]
    """What the results depend on, as JSON values by name."""


def load_inputs(config: EvaluateConfig) -> Inputs:
    """Return all that an evaluation reads but the reference images.

    Raises:
        ArtifactError: something is missing or damaged, or they do not belong together.
        ValueError: a stride is larger than the window of the model it is for, or the device, the feature network or the
            captions' embedder is not to be had.
        NativeOpError: they are to be used, and there are none.
    """
    device = pick_device(config.device)
    model = _load(config, weights=config.weights, use_ema=config.use_ema, device=device)
    control = None
    if config.control is not None:
        control = _load(config, weights=config.control.weights, use_ema=config.control.use_ema, device=device)
        _check_classes(model, control)
    _check_strides(config, model, control)
    tokenizer = Tokenizer.load(config.tokenizer, device=str(device))
    for loaded in (model, control):
        if loaded is not None:
            check_tokenizer(loaded.file, tokenizer)
    held_out = ShardSet.open(config.held_out.shards, s3=config.s3)
    check_codes(held_out, tokenizer=tokenizer)
    training_images = None
    if config.training_set is not None:
        training_images = TrainingImages(config.training_set, tokenizer=tokenizer, s3=config.s3)
    class_captions = None
    if config.captions is not None:
        check_embedder()
        class_captions = read_class_captions(
            config.captions.of_classes,
            class_names=held_out.manifest.class_names,
            num_classes=model.file.config.num_classes,
            s3=config.s3,
        )
    features = load_features(config.features.network, device=device, weights=config.features.weights)
    digests = {
        "spec": _digest_of(binding_fields(config)),
        **digests_of_weights(config),
        "tokenizer": tokenizer.fingerprint.digest,
        "features": features.fingerprint,
        "held_out.shards": digest_of_shards(held_out),
        "training_set.shards": None if training_images is None else digest_of_shards(training_images.shard_set),
        "captions.of_classes": None if class_captions is None else _digest_of(class_captions),
    }
    return Inputs(
        device=device,
        model=model,
        control=control,
        tokenizer=tokenizer,
        held_out=held_out,
        training_images=training_images,
        reader=FeatureReader(features, cache_dir=config.features.cache_dir),
        class_captions=class_captions,
        digests=digests,
    )


def binding_fields(config: EvaluateConfig) -> dict[str, Any]:
    """Return the fields of a spec that its results depend on, as JSON values.

    Without defaults, so that fields which a later version adds do not change it; a section that holds a free field is
    there in any case, or giving that field its default would.
    """
    fields = config.model_dump(mode="json", exclude_defaults=True)
    for name in ("run_dir", *FREE_FIELDS):
        *parents, field = name.split(".")
        level = fields
        for parent in parents:
            level = level.setdefault(parent, {})
        level.pop(field, None)
    return fields


def digest_of_shards(shard_set: ShardSet) -> str:
    """Return 16 hex digits that change with the bytes of a set's shards, whose checksums its manifest has."""
    return _digest_of([shard.sha256 for shard in shard_set.manifest.shards])


def digests_of_weights(config: EvaluateConfig) -> dict[str, str | None]:
    """Return the sha256 of the weights and of the control's, which change where a run trains on.

    Raises:
        ArtifactError: there are none.
    """
    return {
        "weights": digest_of(find_weights(config.weights, s3=config.s3)),
        "control.weights": _digest_of_control(config.control, s3=config.s3),
    }


def _digest_of_control(control: ControlConfig | None, *, s3: S3Config) -> str | None:
    return None if control is None else digest_of(find_weights(control.weights, s3=s3))


def _load(config: EvaluateConfig, *, weights: str, use_ema: bool, device: torch.device) -> LoadedModel:
    model, file = load_model(weights, device=device, dtype=getattr(torch, config.dtype), use_ema=use_ema, s3=config.s3)
    if config.ops == "native":
        check_ops(with_cuda=False)  # on a GPU, what sampling needs is made of torch's own kernels
        model.use_native_ops()
    return LoadedModel(model=model, file=file)


def _check_classes(model: LoadedModel, control: LoadedModel) -> None:
    ours, theirs = model.file.config.num_classes, control.file.config.num_classes
    if ours != theirs:
        raise ArtifactError(
            f"evaluate against {control.file.path}: the control must have the model's num_classes = {ours}, got "
            f"{theirs}; name a control that was trained on the same codes"
        )


def _check_strides(config: EvaluateConfig, model: LoadedModel, control: LoadedModel | None) -> None:
    samplers = [("sampler.stride", config.sampler, model)]
    if control is not None and config.control is not None:
        own = config.control.sampler
        if own is not None:
            samplers.append(("control.sampler.stride", own, control))
        elif control.file.config.window_size > 1:  # else it takes the sampler without its stride
            samplers.append(("sampler.stride, the control's too without control.sampler,", config.sampler, control))
    for name, sampler, loaded in samplers:
        window_size = loaded.file.config.window_size
        if sampler.stride > window_size:
            raise ValueError(
                f"evaluate {loaded.file.path}: {name} must be in [1, its window_size = {window_size}], got "
                f"{sampler.stride}; lower it"
            )


def _digest_of(values: Any) -> str:
    """Return 16 hex digits of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
