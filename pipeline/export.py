"""A shard set in LlamaGen's layout: two npy files a sample, as its `extract_codes_c2i.py` writes and its trainer reads.

The invariant: file i is the i-th sample of the set, and `export.json` counts the shards whose files were all committed,
so a rerun writes those after the last of them, and before it those that lost a file since. Memory is one shard's and a
listing of a folder's. Millions of small files are slow by nature (600 to 1,000 samples a second on two cores); the
layout leaves no choice.
"""

from __future__ import annotations

import hashlib
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, ValidationError

from pipeline.config import S3Config
from pipeline.ledger import MANIFEST_NAME, Manifest, read_manifest
from pipeline.shards import ShardReader, ShardSample, open_shard
from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.config import Config, ViewsConfig
from tokenization.messages import reason_of

RECORD_NAME = "export.json"
NUM_WRITERS = 8

logger = logging.getLogger(__name__)


class ExportRecord(Config):
    """How far an export is; `export.json` beside its folders."""

    version: Literal[1] = 1
    """Version of this format."""
    layout: Literal["llamagen"] = "llamagen"
    """What the files are."""
    fingerprint_digest: str
    """Of the tokenizer that made the codes."""
    manifest_sha256: str
    """Of the manifest of the exported set."""
    num_shards_done: NonNegativeInt
    """Shards, in the manifest's order, whose files are all committed."""


@dataclass(frozen=True, kw_only=True)
class LlamaGenExport:
    """Where an export is and what LlamaGen has to be told of it.

    Attributes:
        code_path: its `--code-path`.
        image_size_px: its `--image-size`.
        patch_px: its `--downsample-size`.
        codebook_size: its `--vocab-size`.
        num_classes: its `--num-classes`; None where the set does not name its classes.
        num_samples: files in each of the two folders.
        num_views: views of a sample.
        codes_per_image: codes of a view.
    """

    code_path: str
    image_size_px: int
    patch_px: int
    codebook_size: int
    num_classes: int | None
    num_samples: int
    num_views: int
    codes_per_image: int


def export_llamagen(storage: Storage, *, output: str, s3: S3Config) -> LlamaGenExport:
    """Write a shard set as npy files, or what is left of them to write, and return what is there.

    In the folder of `output` that `code_folder` names, `imagenet{S}_codes/{i}.npy` is int64 `(1, V, T)` and
    `imagenet{S}_labels/{i}.npy` int64 `(1,)`; S is the image size in px.

    Args:
        storage: a finished shard set.
        output: directory or `s3://` URL to make that folder in.
        s3: how `output` is reached.

    Raises:
        ArtifactError: the set is not finished or is damaged, a sample has no label, or the folder holds the export of
            another set.
        ValueError: `output` has a name that misleads LlamaGen's loader.

    Source: LlamaGen's `extract_codes_c2i.py` and the `CustomDataset` of its `dataset/imagenet.py`.
    """
    manifest = read_manifest(storage)
    target = open_storage(f"{output.rstrip('/')}/{code_folder(manifest.views, output=output)}", s3=s3)
    with target.exclusive():
        _write_missing(storage, manifest, target=target)
    return LlamaGenExport(
        code_path=target.url,
        image_size_px=manifest.fingerprint.image_size_px,
        patch_px=manifest.fingerprint.network.patch_px,
        codebook_size=manifest.fingerprint.network.codebook_size,
        num_classes=None if manifest.class_names is None else len(manifest.class_names),
        num_samples=manifest.num_samples,
        num_views=manifest.num_views,
        codes_per_image=manifest.codes_per_image,
    )


def code_folder(views: ViewsConfig, *, output: str) -> str:
    """Return the folder name from which LlamaGen's loader learns what the files hold; pure.

    It draws one of the views only where the path contains `flip`, and every other time a view of the set whose path has
    `ten_crop_105/` for `ten_crop/`, where that exists: so `crop_range` 1.1 ends in `ten_crop` and 1.05 in
    `ten_crop_105`.

    Raises:
        ValueError: a folder of `output` ends in `ten_crop`; it would be replaced too.
    """
    if views.kind != "ten_crop":
        return "code_c2i" if views.kind == "center" else "code_c2i_flip"
    if "ten_crop/" in f"{output}/":
        raise ValueError(
            f"export to {output}: no folder in the path of --output may end in ten_crop (LlamaGen replaces it in the "
            f"whole path and would not find the second set of crops), got {output!r}; use another --output"
        )
    percent = f"{views.crop_range * 100:g}"
    return "code_c2i_flip_ten_crop" if percent == "110" else f"code_c2i_flip_ten_crop_{percent}"


def _write_missing(storage: Storage, manifest: Manifest, *, target: Storage) -> None:
    """Write the files of the shards that the record does not count yet, or whose files are gone, and count them."""
    record = _begin(storage, manifest, target=target)
    num_shards, num_done = len(manifest.shards), record.num_shards_done
    starts = list(accumulate((shard.num_samples for shard in manifest.shards), initial=0))
    is_there = _find_written(target, manifest)
    torn = [index for index in range(num_done) if not is_there[starts[index] : starts[index + 1]].all()]
    if torn:
        logger.warning(
            "export %s: files of %d of %d shards are gone; they are written again", target, len(torn), num_done
        )
    if torn or num_done < num_shards:
        target.remove_staged()
    with ThreadPoolExecutor(NUM_WRITERS) as threads:
        for shard_index in [*torn, *range(num_done, num_shards)]:
            indices = range(starts[shard_index], starts[shard_index + 1])
            reader = open_shard(storage, f"shards/{manifest.shards[shard_index].name}")
            samples = _read_labelled(reader, num_samples=len(indices), manifest=manifest)
            for _ in threads.map(_write_sample, repeat(target), repeat(manifest), indices, samples):
                pass  # an error of a thread is raised here
            record = record.model_copy(update={"num_shards_done": max(num_done, shard_index + 1)})
            target.write_json(RECORD_NAME, record.model_dump(mode="json"))
            logger.info("export %s: shards=%d of %d samples=%d", target, shard_index + 1, num_shards, indices.stop)


def _begin(storage: Storage, manifest: Manifest, *, target: Storage) -> ExportRecord:
    """Return the record of an earlier run; a first run writes it, so that no other set is exported beside its files."""
    new = ExportRecord(
        fingerprint_digest=manifest.fingerprint.digest,
        manifest_sha256=hashlib.sha256(storage.read_bytes(MANIFEST_NAME)).hexdigest(),
        num_shards_done=0,
    )
    if target.find(RECORD_NAME) is None:
        target.write_json(RECORD_NAME, new.model_dump(mode="json"))
        return new
    where, rule = f"export {storage} to {target}", f"its {RECORD_NAME} must speak of this set as it is now"
    try:
        record = ExportRecord.model_validate_json(target.read_bytes(RECORD_NAME))
    except ValidationError as error:
        got = f"a damaged one ({reason_of(error)})"
        raise ArtifactError(f"{where}: {rule}, got {got}; remove the folder and rerun") from error
    if record.model_copy(update={"num_shards_done": 0}) != new:
        raise ArtifactError(
            f"{where}: {rule}, got manifest {record.manifest_sha256[:8]}.. of tokenizer {record.fingerprint_digest}, "
            f"not {new.manifest_sha256[:8]}.. of {new.fingerprint_digest}; use another --output or remove the folder"
        )
    return record


def _find_written(target: Storage, manifest: Manifest) -> npt.NDArray[np.bool_]:
    """Return of each sample of the set whether both of its files are there in their whole size, by two listings."""
    is_there = np.ones(manifest.num_samples, dtype=np.bool_)
    codes = np.zeros((1, manifest.num_views, manifest.codes_per_image), dtype=np.int64)
    for folder, content in zip(_folders(manifest), (codes, np.zeros(1, dtype=np.int64)), strict=True):
        found, num_bytes = np.zeros_like(is_there), len(_npy(content))
        for name, info in target.list(f"{folder}/").items():
            stem = name.removeprefix(f"{folder}/").removesuffix(".npy")
            if stem.isdecimal() and int(stem) < len(found) and info.num_bytes == num_bytes:
                found[int(stem)] = True
        is_there &= found
    return is_there


def _folders(manifest: Manifest) -> tuple[str, str]:
    """Return the folders of codes and of labels."""
    stem = f"imagenet{manifest.fingerprint.image_size_px}"
    return f"{stem}_codes", f"{stem}_labels"


def _read_labelled(reader: ShardReader, *, num_samples: int, manifest: Manifest) -> list[ShardSample]:
    """Return the samples of a shard, every one of them checked before any is written."""
    if reader.num_samples != num_samples:
        raise ArtifactError(
            f"export {reader.where}: it must hold the manifest's {num_samples} samples, got {reader.num_samples}; "
            "run tensorar verify on the set"
        )
    samples = [reader.sample(position) for position in range(reader.num_samples)]
    wanted = (manifest.num_views, manifest.codes_per_image)
    for sample in samples:
        where = f"export sample {sample.key} of {reader.where}"
        if sample.codes_VT.shape != wanted:
            raise ArtifactError(
                f"{where}: codes must be (views, T) = {wanted}, got {sample.codes_VT.shape}; tokenize again"
            )
        label = sample.metadata.get("label")
        if type(label) is not int or label < 0:
            raise ArtifactError(
                f"{where}: LlamaGen's layout wants a class label >= 0 of every sample, got {label!r}; "
                "give the source labels (class folders, a label in its JSON, a cls member) and tokenize again"
            )
    return samples


def _write_sample(target: Storage, manifest: Manifest, index: int, sample: ShardSample) -> None:
    codes_folder, labels_folder = _folders(manifest)
    target.write_bytes(f"{codes_folder}/{index}.npy", _npy(sample.codes_VT[None].astype(np.int64)))
    target.write_bytes(f"{labels_folder}/{index}.npy", _npy(np.array([sample.metadata["label"]], dtype=np.int64)))


def _npy(array: npt.NDArray[np.int64]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
