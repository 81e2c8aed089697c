"""Many samples of the shard format read in one go: codes of one view each, and labels, checked as one array.

The invariant: a sample is accepted only if its headers, names, checksums, sizes, npy header and padding are those that
`ShardWriter` writes and the codes of its view are in the codebook; every other one is left to the exact reading of
`ShardReader.sample`, which says what is wrong. A tar is a column of 512-byte blocks, so a batch is gathered by block
numbers and compared in words of 8 bytes: about 3 us a sample of 256 codes, label included.

B samples, C blocks gathered of each, V views, T codes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.npy_codes import NPY_HEADER_BYTES, codes_dtype, npy_of_codes
from pipeline.philox import Int64Array
from pipeline.sample_labels import find_labels
from pipeline.shards import CODES_EXTENSION, JSON_EXTENSION
from pipeline.ustar import CHECKSUM_FIELD, MAX_NAME_BYTES, SIZE_FIELD, TAR_BLOCK_BYTES, member_bytes, member_span

MAX_JSON_BLOCKS = 8
"""Longer JSON is read sample by sample, so that one long text does not widen a whole batch."""

UInt8Array = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

_CHECKSUM_DIGITS = slice(CHECKSUM_FIELD.start, CHECKSUM_FIELD.start + 6)
_SIZE_PLACES = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_CHECKSUM_PLACES = _SIZE_PLACES[-6:]
_ZERO = ord("0")


class Decoded(NamedTuple):
    """What was read of B samples."""

    codes_BT: npt.NDArray[np.integer]
    """Codes of the chosen views, in the dtype they are stored in."""
    labels_B: Int64Array
    """Labels; `NO_LABEL` where a sample has none."""
    is_read_B: BoolArray
    """Whether a sample was accepted; what stands beside it is of no meaning otherwise."""


class _Headers(NamedTuple):
    """What the headers of samples with keys of one length must be; the JSON's stands behind that of the codes."""

    words: UInt64Array
    """Their bytes, in words; `(128,)`."""
    mask: UInt64Array
    """Zero at the bytes that differ between samples: key, checksum, size of the JSON."""
    rest_of_checksum: tuple[int, int]
    """What all other bytes add to the checksums of either."""


class SampleBlocks:
    """The layout of every sample of a set, in blocks."""

    def __init__(self, *, num_views: int, codes_per_image: int, codebook_size: int) -> None:
        """Lay out a sample of V = `num_views` views of T = `codes_per_image` codes."""
        self._codebook_size = codebook_size
        self._dtype = np.dtype(codes_dtype(codebook_size))
        npy = npy_of_codes(np.zeros((num_views, codes_per_image), dtype=self._dtype))
        self._npy_header = np.frombuffer(npy[:NPY_HEADER_BYTES], dtype=np.uint64)
        self._codes_bytes = len(npy)
        self._codes_blocks = member_span(len(npy)) // TAR_BLOCK_BYTES
        self._padding = slice(len(npy) % TAR_BLOCK_BYTES or TAR_BLOCK_BYTES, None)
        self._view_bytes = codes_per_image * self._dtype.itemsize
        starts_V = TAR_BLOCK_BYTES + NPY_HEADER_BYTES + self._view_bytes * np.arange(num_views)
        first_block_V, self._start_in_block_V = np.divmod(starts_V, TAR_BLOCK_BYTES)
        ends_V = -(-(starts_V + self._view_bytes) // TAR_BLOCK_BYTES)
        num_blocks = int((ends_V - first_block_V).max())
        view_VC = np.minimum(first_block_V[:, None] + np.arange(num_blocks), self._codes_blocks - 1)
        if num_views == 1:
            fixed, tail = [0], [self._codes_blocks]
            self._view, self._npy, self._last_codes = slice(1, 1 + num_blocks), 1, num_blocks
        else:
            fixed, tail = [0, 1], [self._codes_blocks - 1, self._codes_blocks]
            self._view, self._npy, self._last_codes = slice(2, 2 + num_blocks), 1, 2 + num_blocks
        self._json = self._last_codes + 1
        parts = [np.tile(fixed, (num_views, 1)), view_VC, np.tile(tail, (num_views, 1))]
        self._columns_VC = np.concatenate(parts, axis=1)

    def block_numbers(self, starts_B: Int64Array, ends_B: Int64Array, *, views_B: Int64Array) -> Int64Array:
        """Return the blocks to gather, `(B, C)`, for samples in the blocks `[start, end)` of their tars.

        They are the header of the codes, the blocks of the npy header, of the view and of the codes' end, the header of
        the JSON, and the JSON; where a sample has fewer blocks its last one is repeated.
        """
        json_blocks = int((ends_B - starts_B).max()) - self._codes_blocks - 1
        json = np.arange(self._codes_blocks + 1, self._codes_blocks + 1 + min(max(json_blocks, 1), MAX_JSON_BLOCKS))
        num_columns = self._columns_VC.shape[1]
        numbers = np.empty((len(starts_B), num_columns + len(json)), dtype=np.int64)
        numbers[:, :num_columns] = self._columns_VC[views_B]
        numbers[:, num_columns:] = json
        numbers += starts_B[:, None]
        return np.minimum(numbers, ends_B[:, None] - 1, out=numbers)

    def decode(self, blocks_BC: UInt8Array, *, spans_B: Int64Array, views_B: Int64Array) -> Decoded:
        """Return what gathered blocks hold.

        Args:
            blocks_BC: `(B, C, 512)`, as `block_numbers` says; blocks that were repeated are overwritten.
            spans_B: blocks of each whole sample, by the index.
            views_B: the view of each, as given to `block_numbers`.
        """
        sizes_B, is_read_B = self._check_headers(blocks_BC)
        npy_header = blocks_BC[:, self._npy, :NPY_HEADER_BYTES].view(np.uint64)
        is_read_B &= (npy_header == self._npy_header).all(axis=1)
        is_read_B &= ~blocks_BC[:, self._last_codes, self._padding].any(axis=1)
        is_read_B &= spans_B == self._codes_blocks + 1 + -(-sizes_B // TAR_BLOCK_BYTES)
        json = blocks_BC[:, self._json + 1 :]
        json_blocks_B = spans_B - self._codes_blocks - 1
        if json_blocks_B.min() < json.shape[1]:
            json[np.arange(json.shape[1]) >= json_blocks_B[:, None]] = 0
        text_BN = json.reshape(len(blocks_BC), -1)
        labels_B, is_read_B = find_labels(text_BN, sizes_B=sizes_B, is_read_B=is_read_B)
        codes_BT = self._codes(blocks_BC[:, self._view], views_B=views_B)
        if codes_BT.min() < 0 or codes_BT.max() >= self._codebook_size:
            is_read_B &= (codes_BT.min(axis=1) >= 0) & (codes_BT.max(axis=1) < self._codebook_size)
        return Decoded(codes_BT=codes_BT, labels_B=labels_B, is_read_B=is_read_B)

    def _codes(self, blocks: UInt8Array, *, views_B: Int64Array) -> npt.NDArray[np.integer]:
        content = blocks.reshape(len(blocks), -1)
        starts_B = self._start_in_block_V[views_B]
        starts = np.unique(self._start_in_block_V).tolist()
        if len(starts) == 1:  # the bytes of a view are a multiple of a block's, or there is one view
            return np.ascontiguousarray(content[:, starts[0] : starts[0] + self._view_bytes]).view(self._dtype)
        result = np.empty((len(blocks), self._view_bytes), dtype=np.uint8)
        for start in starts:
            chosen = starts_B == start
            result[chosen] = content[chosen, start : start + self._view_bytes]
        return result.view(self._dtype)

    def _check_headers(self, blocks_BC: UInt8Array) -> tuple[Int64Array, BoolArray]:
        """Return the size of each sample's JSON, and whether both its headers are what the writer writes."""
        num_digits = bytes(blocks_BC[0, 0, :MAX_NAME_BYTES]).find(b".")  # equal over a set
        if not 0 < num_digits < MAX_NAME_BYTES - len(f".{CODES_EXTENSION}"):
            return np.zeros(len(blocks_BC), dtype=np.int64), np.zeros(len(blocks_BC), dtype=bool)
        expected = _expected_headers(num_digits, codes_bytes=self._codes_bytes)
        headers = blocks_BC[:, [0, self._json]].reshape(len(blocks_BC), -1)
        is_good = ~((headers.view(np.uint64) ^ expected.words) & expected.mask).any(axis=1)
        codes_header, json_header = headers[:, :TAR_BLOCK_BYTES], headers[:, TAR_BLOCK_BYTES:]
        key, size = codes_header[:, :num_digits] - _ZERO, json_header[:, SIZE_FIELD] - _ZERO
        is_good &= ~(key > 9).any(axis=1) & ~(size > 7).any(axis=1)
        is_good &= (json_header[:, :num_digits] == codes_header[:, :num_digits]).all(axis=1)
        of_key = key.sum(axis=1, dtype=np.int64) + _ZERO * num_digits
        of_size = size.sum(axis=1, dtype=np.int64) + _ZERO * len(_SIZE_PLACES)
        is_good &= _has_checksum(codes_header, of_key + expected.rest_of_checksum[0])
        is_good &= _has_checksum(json_header, of_key + of_size + expected.rest_of_checksum[1])
        return size.astype(np.int64) @ _SIZE_PLACES, is_good


@lru_cache(maxsize=16)
def _expected_headers(num_digits: int, *, codes_bytes: int) -> _Headers:
    key = "0" * num_digits
    codes = member_bytes(f"{key}.{CODES_EXTENSION}", bytes(codes_bytes))[:TAR_BLOCK_BYTES]
    json = member_bytes(f"{key}.{JSON_EXTENSION}", b"")[:TAR_BLOCK_BYTES]
    mask = np.full((2, TAR_BLOCK_BYTES), 0xFF, dtype=np.uint8)
    mask[:, :num_digits] = mask[:, _CHECKSUM_DIGITS] = mask[1, SIZE_FIELD] = 0
    rest = [int(digits, 8) - _ZERO * num_digits for digits in (codes[_CHECKSUM_DIGITS], json[_CHECKSUM_DIGITS])]
    return _Headers(
        words=np.frombuffer(codes + json, dtype=np.uint64),
        mask=mask.reshape(-1).view(np.uint64),
        rest_of_checksum=(rest[0], rest[1] - _ZERO * len(_SIZE_PLACES)),
    )


def _has_checksum(header: UInt8Array, checksum_B: Int64Array) -> BoolArray:
    digits = header[:, _CHECKSUM_DIGITS] - _ZERO
    return np.asarray(((digits.astype(np.int64) @ _CHECKSUM_PLACES) == checksum_B) & ~(digits > 7).any(axis=1))
