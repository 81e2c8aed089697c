"""The `.npz` that ADM's evaluator reads: images as `arr_0`, uint8 (N, H, W, 3); and its reference statistics.

Only arrays are read, never pickled objects. The published FIDs come from that evaluator and its Inception: a file of
50,000 samples written here can be judged by it wherever TensorFlow is. No job reads such files: reading is for scripts
that compare with a published reference (`distances.frechet_distance_of_moments`).

Source: openai/guided-diffusion, evaluations.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.evaluation.distances import Moments

IMAGES_MEMBER = "arr_0"
MEAN_MEMBER, COVARIANCE_MEMBER = "mu", "sigma"

Images = npt.NDArray[np.uint8]


def write_adm_npz(path: Path, batches: Iterable[Images], *, num_images: int) -> None:
    """Write images as an ADM sample file, uncompressed; a batch at a time is in memory.

    Args:
        path: a new file; whoever writes it commits it.
        batches: uint8 RGB (B, H, W, 3), all of one size.
        num_images: in all batches, at least one.

    Raises:
        ValueError: another dtype or shape, or another number of images.
    """
    written = 0
    with zipfile.ZipFile(path, "w") as archive, archive.open(f"{IMAGES_MEMBER}.npy", "w", force_zip64=True) as member:
        for images_BHWC in batches:
            _check_images(images_BHWC, path=path, doing="writing")
            if not written:
                shape = images_BHWC.shape[1:]
                header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *shape)}
                np.lib.format.write_array_header_1_0(member, header)
            elif images_BHWC.shape[1:] != shape:
                raise ValueError(
                    f"writing {path}: all images must have the shape of the first, {shape}, got "
                    f"{images_BHWC.shape[1:]}; pass images of one size"
                )
            member.write(np.ascontiguousarray(images_BHWC).data)
            written += len(images_BHWC)
    if written != num_images or not written:
        raise ValueError(f"writing {path}: it must hold num_images = {num_images} images, got {written}; pass as many")


def read_adm_npz(path: Path) -> Images:
    """Return the images of an ADM sample or reference file, (N, H, W, 3) uint8.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    images_NHWC = _read(path, IMAGES_MEMBER)
    _check_images(images_NHWC, path=path, doing="reading")
    return images_NHWC.astype(np.uint8, copy=False)


def read_adm_moments(path: Path) -> Moments:
    """Return the moments of the Inception features in an ADM reference file (`mu`, `sigma`).

    They compare with `inception-v3` features of samples, and with no other network's.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    mean_F, covariance_FF = _read(path, MEAN_MEMBER), _read(path, COVARIANCE_MEMBER)
    if mean_F.ndim != 1 or covariance_FF.shape != (len(mean_F), len(mean_F)) or mean_F.dtype.kind != "f":
        raise ValueError(
            f"reading {path}: mu must be (F,) and sigma (F, F) of floats, got {mean_F.dtype} {mean_F.shape} and "
            f"{covariance_FF.shape}; take an ADM reference file"
        )
    return Moments(mean_F=mean_F.astype(np.float64), covariance_FF=covariance_FF.astype(np.float64))


def _read(path: Path, member: str) -> npt.NDArray[np.generic]:
    if not zipfile.is_zipfile(path):
        found = "another file" if path.is_file() else "no file"
        raise ValueError(f"reading {path}: it must be an npz file, got {found}; write or fetch it again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            array: npt.NDArray[np.generic] | None = archive[member] if member in names else None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"reading {path}: {member} must be a whole array of numbers, got {error!r}; write or fetch it again"
        ) from error
    if array is None:
        raise ValueError(
            f"reading {path}: it must have an array {member}, got {', '.join(names)}; take a file in ADM's layout"
        )
    return array


def _check_images(images_NHWC: npt.NDArray[np.generic], *, path: Path, doing: str) -> None:
    shape = images_NHWC.shape
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or shape[3] != 3 or not images_NHWC.size:
        raise ValueError(
            f"{doing} {path}: arr_0 must be uint8 images of shape (N, H, W, 3), got {images_NHWC.dtype} {shape}; "
            f"pass decoded RGB images"
        )
