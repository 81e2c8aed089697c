"""A committed shard set with random access to its samples: sample indices -> codes and labels.

Invariant: every sample that is returned has passed the checks of the format, and is in the codebook; one that has not
is named with its shard, its key or position, and the rule. Shards are read through `.tar.idx` and one mapping each;
shards on S3 are downloaded whole into a `ShardCache`, or into memory without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config import S3Config
from pipeline.ledger import Manifest, read_manifest, stem_of
from pipeline.open_shards import OpenShards
from pipeline.philox import Int64Array
from pipeline.sample_blocks import Decoded, SampleBlocks
from pipeline.sample_labels import NO_LABEL
from pipeline.shard_cache import ShardCache
from pipeline.shards import REWRITE, ShardInfo, ShardReader, open_shard
from pipeline.storage import S3_SCHEME, ArtifactError, Storage, open_storage
from pipeline.ustar import TAR_BLOCK_BYTES
from tokenization.fingerprint import Fingerprint

WINDOWS_OPEN = 3
"""Windows of shards that stay open: the one being read, the one after it, and one just left."""
DEFAULT_WINDOW_SHARDS = 16


class ReadSamples(NamedTuple):
    """B samples as they were read."""

    codes_BT: Int64Array
    """Codes of the chosen view of each; undefined where it is damaged."""
    labels_B: Int64Array
    """Labels; `NO_LABEL` (-1) where a sample has none."""
    damages: dict[int, ArtifactError]
    """What is wrong with the damaged ones, by their place in the batch."""


class ShardSet:
    """The samples of a committed shard set; any thread may read."""

    def __init__(self, storage: Storage, manifest: Manifest, *, cache: ShardCache | None, window_shards: int) -> None:
        """Use `ShardSet.open`."""
        self._storage, self.manifest, self._cache = storage, manifest, cache
        self.samples_per_shard = np.array([shard.num_samples for shard in manifest.shards], dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self.samples_per_shard)))
        self._window_shards = window_shards
        self._open_shards = OpenShards(self._open_reader, max_open=WINDOWS_OPEN * window_shards)
        self._blocks = SampleBlocks(
            num_views=self.num_views, codes_per_image=self.codes_per_image, codebook_size=self.codebook_size
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        fingerprint: Fingerprint | None = None,
        s3: S3Config = S3Config(),  # noqa: B008  (frozen)
        cache: ShardCache | None = None,
        window_shards: int = DEFAULT_WINDOW_SHARDS,
    ) -> ShardSet:
        """Return the shard set in `path`; opens no shard.

        Args:
            path: the `run_dir` of a finished tokenize job, a directory or an s3:// URL.
            fingerprint: of the tokenizer that the codes must come from; none accepts any.
            s3: how S3 is reached.
            cache: where shards on S3 are downloaded to; none downloads them into memory.
            window_shards: shards that are read together; three times as many stay open.

        Raises:
            ArtifactError: no manifest, no samples, or another tokenizer's codes.
        """
        storage = open_storage(str(path), s3=s3)
        manifest = read_manifest(storage)
        num_in_shards = sum(shard.num_samples for shard in manifest.shards)
        if manifest.num_samples == 0 or manifest.num_samples != num_in_shards:
            raise ArtifactError(
                f"open shard set {path}: its manifest must count the samples of its shards, at least 1, got "
                f"{manifest.num_samples} for {num_in_shards}; check its rejects/, or tokenize again"
            )
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise ArtifactError(
                f"open shard set {path}: tokenizer fingerprint must be {fingerprint.digest}, got "
                f"{manifest.fingerprint.digest}; tokenize both sets with the same tokenizer section"
            )
        is_remote = str(path).startswith(S3_SCHEME)
        return cls(storage, manifest, cache=cache if is_remote else None, window_shards=window_shards)

    @property
    def url(self) -> str:
        """Where the set is, for messages."""
        return self._storage.url

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the tokenizer that wrote the set."""
        return self.manifest.fingerprint

    @property
    def num_samples(self) -> int:
        """Samples of the set."""
        return int(self.manifest.num_samples)

    @property
    def num_views(self) -> int:
        """Views of every sample."""
        return int(self.manifest.num_views)

    @property
    def codebook_size(self) -> int:
        """Codes of the tokenizer that wrote the set."""
        return int(self.manifest.fingerprint.network.codebook_size)

    @property
    def codes_per_image(self) -> int:
        """T, the codes of every view."""
        return int(self.manifest.codes_per_image)

    def most_cached_bytes(self, *, samples_apart: int) -> int:
        """Return what the shards that the ranks of a machine hold open take at most in the cache; 0 without one.

        Args:
            samples_apart: the most that lie between two ranks' places in the set's order. All shards between them may
                be open, beside the windows that one rank keeps open and one window more.
        """
        if self._cache is None:
            return 0
        num_between = int(np.searchsorted(np.cumsum(np.sort(self.samples_per_shard)), samples_apart, side="right"))
        sizes = sorted((shard.bytes + 8 * (shard.num_samples + 1) for shard in self.manifest.shards), reverse=True)
        return sum(sizes[: (WINDOWS_OPEN + 1) * self._window_shards + num_between])

    def samples_of_shard_with(self, sample_index: int) -> range:
        """Return the indices of all samples that the shard of a sample holds."""
        shard = self._shard_of(sample_index)
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def sample_name(self, sample_index: int) -> str:
        """Return what a person finds a sample by: the URL of its shard and its key, or position where it is damaged."""
        shard = self._shard_of(sample_index)
        reader, position = self._open_shards.reader(shard), sample_index - int(self._starts[shard])
        try:
            return f"{reader.where}:{reader.sample(position).key}"
        except ArtifactError:
            return f"{reader.where}:position {position}"

    def metadata(self, sample_index: int) -> dict[str, Any]:
        """Return the JSON of one sample.

        Raises:
            ArtifactError: its bytes are not a sample's.
        """
        shard = self._shard_of(sample_index)
        return self._open_shards.reader(shard).sample(sample_index - int(self._starts[shard])).metadata

    def expect(self, shards: list[int]) -> None:
        """Begin to open shards that will be read soon, in this order; returns at once."""
        self._open_shards.expect(shards)

    def close(self) -> None:
        """Close what is open and end the threads that open ahead; reading again opens again."""
        self._open_shards.close()

    def read(self, sample_index: int) -> tuple[npt.NDArray[np.integer], int]:
        """Return the codes `(V, T)` and the label of one sample; `NO_LABEL` where it has none.

        Raises:
            ArtifactError: its bytes are not a sample's, a code is not in the codebook, or the label is not a whole
                number >= 0.
        """
        shard = self._shard_of(sample_index)
        reader = self._open_shards.reader(shard)
        sample = reader.sample(sample_index - int(self._starts[shard]))
        where = f"read sample {sample.key} of {reader.where}"
        codes_VT, label = sample.codes_VT, sample.metadata.get("label")
        if codes_VT.shape != (self.num_views, self.codes_per_image):
            wanted = f"({self.num_views}, {self.codes_per_image})"
            raise ArtifactError(f"{where}: codes must be (views, T) = {wanted}, got {codes_VT.shape}; tokenize again")
        if codes_VT.min() < 0 or codes_VT.max() >= self.codebook_size:
            bad = codes_VT.max() if codes_VT.max() >= self.codebook_size else codes_VT.min()
            raise ArtifactError(f"{where}: codes must be in [0, {self.codebook_size}), got {bad}; tokenize again")
        if label is not None and (type(label) is not int or not 0 <= label < 2**63):
            raise ArtifactError(f"{where}: label must be a whole number >= 0, got {label!r}; mend the source")
        return codes_VT, NO_LABEL if label is None else label

    def read_batch(self, sample_indices: Int64Array, *, views: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the codes `(B, T)` of one view of each sample and the labels `(B,)`, both int64.

        Raises:
            ArtifactError: a sample is damaged; the first one is named.
        """
        samples = self.try_read_batch(sample_indices, views=views)
        if samples.damages:
            raise samples.damages[min(samples.damages)]
        return samples.codes_BT, samples.labels_B

    def try_read_batch(self, sample_indices: Int64Array, *, views: Int64Array) -> ReadSamples:
        """Return one view of each sample, and which samples are damaged; about 4 us a sample where few are.

        Raises:
            ArtifactError: a shard cannot be opened.
        """
        # By shard, so that each one's samples are gathered at once into neighbouring places.
        order = np.argsort(sample_indices, kind="stable")
        indices, views_B = sample_indices[order], views[order]
        decoded = self._decode_sorted(indices, views_B)
        codes_BT, labels_B = np.empty(decoded.codes_BT.shape, dtype=np.int64), np.empty_like(decoded.labels_B)
        codes_BT[order], labels_B[order] = decoded.codes_BT, decoded.labels_B
        damages: dict[int, ArtifactError] = {}
        for place in np.flatnonzero(~decoded.is_read_B).tolist():
            try:
                codes_VT, labels_B[order[place]] = self.read(int(indices[place]))
                codes_BT[order[place]] = codes_VT[views_B[place]]
            except ArtifactError as error:
                damages[int(order[place])] = error
        return ReadSamples(codes_BT=codes_BT, labels_B=labels_B, damages=damages)

    def _decode_sorted(self, indices: Int64Array, views_B: Int64Array) -> Decoded:
        """Return what the bulk reading accepts of samples in ascending order."""
        shards_B = np.searchsorted(self._starts, indices, side="right") - 1
        bounds = np.flatnonzero(np.diff(shards_B, prepend=-1, append=-1))
        groups = [slice(start, end) for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        readers = [self._open_shards.reader(int(shards_B[group.start])) for group in groups]
        positions_B = indices - self._starts[shards_B]
        starts_B, ends_B = np.empty_like(indices), np.empty_like(indices)
        for group, reader in zip(groups, readers, strict=True):
            starts_B[group] = reader.byte_offsets[positions_B[group]]
            ends_B[group] = reader.byte_offsets[positions_B[group] + 1]
        starts_B //= TAR_BLOCK_BYTES
        ends_B //= TAR_BLOCK_BYTES
        numbers_BC = self._blocks.block_numbers(starts_B, ends_B, views_B=views_B)
        blocks_BC = np.empty((*numbers_BC.shape, TAR_BLOCK_BYTES), dtype=np.uint8)
        for group, reader in zip(groups, readers, strict=True):
            reader.blocks.take(numbers_BC[group], axis=0, out=blocks_BC[group], mode="clip")
        return self._blocks.decode(blocks_BC, spans_B=ends_B - starts_B, views_B=views_B)

    def _shard_of(self, sample_index: int) -> int:
        return int(np.searchsorted(self._starts, sample_index, side="right")) - 1

    def _open_reader(self, shard: int) -> ShardReader:
        info = self.manifest.shards[shard]
        name = f"shards/{info.name}"
        if self._cache is not None:
            return self._cache.open(self._storage, name, info=info)  # which holds its sha256 against the manifest
        reader = open_shard(self._storage, name)
        if (problem := _problem(reader, info=info)) is not None:
            raise ArtifactError(f"open shard {reader.where}: {problem}; {REWRITE}")
        return reader


def _problem(reader: ShardReader, *, info: ShardInfo) -> str | None:
    """Return what shows at once that a shard is not the manifest's, or None; `tensorar verify` reads all of it."""
    if reader.num_bytes != info.bytes:
        return f"it must have the manifest's {info.bytes} bytes, got {reader.num_bytes}"
    if reader.num_samples != info.num_samples:
        return f"it must hold the manifest's {info.num_samples} samples, got {reader.num_samples}"
    try:
        key = reader.sample(0).key
    except ArtifactError:
        return None  # a damaged sample is for whoever reads it, who may take another
    stem = stem_of(info.name)
    return None if key.startswith(stem) else f"its keys must begin {stem}, got {key}"
