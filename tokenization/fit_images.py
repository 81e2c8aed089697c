"""The images of a tokenizer fit: every usable one below a folder, in memory.

The order is that of the sorted paths, whatever the file system lists first, and nothing is left out without a word.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np

from tokenization.crops import center_crop
from tokenization.decoding import IMAGE_SUFFIXES, decode_image
from tokenization.image_rejection import ImageRejectedError

log = logging.getLogger(__name__)

MAX_IMAGE_PIXELS = 100_000_000


def load_images(folder: str | Path, *, size_px: int) -> np.ndarray:
    """Return all usable images under a folder, in sorted path order, centre-cropped; uint8 (N, size, size, 3).

    Raises:
        ValueError: there is no such folder, or no usable image in it.
    """
    if "://" in str(folder):
        raise ValueError(
            f"loading images {folder}: the folder must be local or mounted, got a URL; copy the images to a disk"
        )
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"loading images {folder}: it must be a folder, got {'a file' if root.exists() else 'nothing there'}; "
            "check the path (`tensorar demo` builds the open-emoji corpus)"
        )
    paths = _image_files(root)
    crops: list[np.ndarray] = []
    for path in paths:
        try:
            image = decode_image(path.read_bytes(), max_pixels=MAX_IMAGE_PIXELS)
            crops.append(center_crop(image, size_px))
        except ImageRejectedError as error:
            log.warning("event=image_rejected path=%s reason=%s", path, error.reason)
    if not crops:
        raise ValueError(
            f"loading images {folder}: the folder must hold at least one usable image, got none in {len(paths)} files "
            f"that end in {', '.join(IMAGE_SUFFIXES)}; check the path"
        )
    return np.stack(crops)


def _image_files(root: Path) -> list[Path]:
    """Return the paths of the image files under a folder, sorted; links are followed, each folder is entered once."""
    found: list[Path] = []
    passed_over = Counter[str]()
    seen = {_identity(root)}
    for directory, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        below = {name: _identity(Path(directory, name)) for name in sorted(folders)}
        folders[:] = []
        for name, identity in below.items():
            if identity in seen:
                passed_over["folders_linked_again"] += 1
            else:
                seen.add(identity)
                folders.append(name)
        for path in (Path(directory, name) for name in names):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                passed_over["other_endings"] += 1
            elif not path.is_file():
                passed_over["no_files"] += 1
            else:
                found.append(path)
    if passed_over:
        told = " ".join(f"{reason}={number}" for reason, number in sorted(passed_over.items()))
        log.warning("event=passed_over folder=%s images=%d %s", root, len(found), told)
    return sorted(found)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error
