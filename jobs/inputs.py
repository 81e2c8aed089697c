"""Checks what a training run reads before any rank is started: seconds in one process instead of a failed launch.

It only reads records: manifests, headers of weights, the records of checkpoints; no codes, no tensors.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.storage import ArtifactError, open_storage
from tokenization.fingerprint import Fingerprint
from training.checkpoint import newest_record
from training.config import TrainConfig
from training.data import open_shards
from training.ops import check_ops
from training.run_weights import RunCheckpoint
from training.tensorar import module_hidden_dim
from training.weights import find_weights
from training.weights_file import ModelHeader

_FIELDS = ("layers", "heads", "dim", "codebook_size", "num_classes")

logger = logging.getLogger(__name__)


def check_inputs(config: TrainConfig, *, is_new: bool) -> None:
    """Check the native ops, and shards, held-out shards and the warm start against each other and the model.

    What is of a machine, ops and room for cached shards, is checked where ranks run on this one; in a cluster that was
    joined they do it for themselves, as its head may have neither GPU nor disk.

    Args:
        config: of the run.
        is_new: whether the run has no checkpoint yet; only then its warm start is read.

    Raises:
        ArtifactError: something is missing, damaged, or was not made for this run; the message says what to do.
        NativeOpError: the run is to use the native ops, and there are none.
    """
    is_here = config.cluster.address == "local"
    if is_here and config.engine.ops == "native":
        check_ops(with_cuda=config.cluster.gpus_per_worker > 0)
    shard_sets, _ = open_shards(config, is_here=is_here)
    if is_new and config.warm_start is not None:
        header = _header_of(config, config.warm_start)
        if header is not None:  # else LlamaGen's own file, whose shapes are known once its tensors are read
            _check_model(config, config.warm_start, header)
            _tell_of_other_codes(config.warm_start, header.fingerprint, of_shards=shard_sets[0].fingerprint)


def _check_model(config: TrainConfig, url: str, header: ModelHeader) -> None:
    found, wanted = header.config, config.model
    fields = [(name, getattr(found, name), getattr(wanted, name)) for name in _FIELDS]
    if found.window_size != 1:
        fields.append(("window_size", found.window_size, wanted.window_size))
        fields.append(("hidden width of the modules", module_hidden_dim(found), module_hidden_dim(wanted)))
    differing = [f"{name} (there {have}, in the spec {want})" for name, have, want in fields if have != want]
    if differing:
        raise ArtifactError(
            f"warm start from {url}: the weights must be of this model, or of its base model, but these differ: "
            f"{', '.join(differing)}; correct model, or name other weights"
        )


def _tell_of_other_codes(url: str, of_weights: Fingerprint | None, *, of_shards: Fingerprint) -> None:
    """Warn where the weights learned another tokenizer's codes: that may be wanted, but is seldom what was meant."""
    if of_weights is not None and of_weights.weights_sha256 != of_shards.weights_sha256:
        logger.warning(
            "warm start from %s: its codes should be those of this run's tokenizer %s (weights %s..), got those of %s "
            "(weights %s..), in which a code means another thing; name other weights unless that is what you want",
            url,
            of_shards.digest,
            of_shards.weights_sha256[:8],
            of_weights.digest,
            of_weights.weights_sha256[:8],
        )


def _header_of(config: TrainConfig, url: str) -> ModelHeader | None:
    """What the weights are of; none where only reading them tells. Raises ArtifactError where there are none."""
    if "://" in url or Path(url).expanduser().is_dir():
        storage = open_storage(url, s3=config.s3)
        record = newest_record(storage)
        if record is not None:  # the ranks verify the files; their record alone says what they are
            return RunCheckpoint(storage=storage, record=record).header
    place = find_weights(url, s3=config.s3)
    if isinstance(place, RunCheckpoint):
        return place.header
    return place.read_header() if place.is_ours else None
