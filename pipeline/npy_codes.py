"""Codes of a sample as the bytes of an npy file, and back.

The invariant: the bytes are those of `np.save` (format 1.0, C order), and only such bytes are read, without its parser,
which takes 30 us a sample for a header that is the same in all of them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_UINT16_CODEBOOK = 65536
NPY_HEADER_BYTES = 128
_HEADER = re.compile(rb"\x93NUMPY\x01\x00v\x00\{'descr': '(<u2|<i4)', .* 'shape': \((\d{1,18}), (\d{1,18})\), \} *\n")

Codes = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


def codes_dtype(codebook_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype that codes of this codebook are stored in."""
    return np.uint16 if codebook_size <= MAX_UINT16_CODEBOOK else np.int32


def npy_of_codes(codes_VT: npt.NDArray[np.integer]) -> bytes:
    """Return the npy bytes of codes, uint16 or int32 `(V, T)`."""
    return _header(codes_VT.shape, dtype=codes_VT.dtype.str) + codes_VT.tobytes()


def codes_of_npy(content: bytes | memoryview) -> Codes:
    """Return the codes `(V, T)` in npy bytes, as an array of their own.

    Raises:
        ValueError: these are not bytes that `npy_of_codes` returns.
    """
    dtype, shape = _parse_header(bytes(content[:NPY_HEADER_BYTES]))
    return np.frombuffer(content, dtype=dtype, offset=NPY_HEADER_BYTES).reshape(shape).copy()


@lru_cache(maxsize=16)
def _header(shape: tuple[int, ...], *, dtype: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(NPY_HEADER_BYTES - 11) + b"\n"


@lru_cache(maxsize=16)
def _parse_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, int]]:
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError("codes without an npy header of ours")
    dtype, shape = match.group(1).decode(), (int(match.group(2)), int(match.group(3)))
    if header != _header(shape, dtype=dtype):
        raise ValueError("codes with a damaged npy header")
    return np.dtype(dtype), shape
