"""Results of an evaluation in parts, each committed as it is made, so that a killed job goes on where it was.

Invariant: a part that is there is whole, and is what making it again would give; the parts depend on what
`stages/inputs.json` names, and a job with other inputs is refused. Every part is one `.npz` of plain arrays.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.storage import ArtifactError, Storage

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

STAGES = "stages"
INPUTS_NAME = f"{STAGES}/inputs.json"
STAGES_VERSION = 2
"""Raised whenever a part would come out otherwise from the same inputs, so that no older program's parts are used."""


class Stages:
    """The committed parts of one evaluation."""

    def __init__(self, storage: Storage) -> None:
        """Keep where they are; reads nothing."""
        self.storage = storage

    def check_inputs(self, inputs: dict[str, Any], *, products: Sequence[str] = ()) -> None:
        """Write what the parts depend on, this program's version of them included, or compare it with what is there.

        Args:
            inputs: JSON values by name.
            products: files that are made of the parts; what lies there when the parts begin is another job's, and goes.

        Raises:
            ArtifactError: the parts that are there come from other inputs; names them.
        """
        inputs = {"stages version": STAGES_VERSION} | inputs
        if self.storage.find(INPUTS_NAME) is None:
            for name in products:
                self.storage.remove(name)
            self.storage.write_json(INPUTS_NAME, inputs)
            return
        try:
            before = dict(json.loads(self.storage.read_bytes(INPUTS_NAME)))
        except ValueError as error:
            raise ArtifactError(
                f"read {self.storage.url_of(INPUTS_NAME)}: it must be whole JSON, got {error}; remove the directory to "
                "begin anew"
            ) from error
        now = json.loads(json.dumps(inputs))
        differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if differing:
            told = ", ".join(f"{name} (then {before.get(name)!r}, now {now.get(name)!r})" for name in differing)
            raise ArtifactError(
                f"evaluate into {self.storage}: what it has begun with must not have changed since, but these have: "
                f"{told}; set another run_dir, or remove the directory to begin anew"
            )

    def has(self, name: str) -> bool:
        """Whether a part is there."""
        return self.storage.find(_file_of(name)) is not None

    def arrays(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Return a part, made and committed where it is not there yet.

        Args:
            name: of the part, such as `samples/00003`.
            make: makes it.

        Raises:
            ArtifactError: the part is damaged.
        """
        if not self.has(name):
            write_arrays(self.storage, _file_of(name), make())
            logger.info("evaluate committed=%s", name)
        return self._read_arrays(_file_of(name))

    def _read_arrays(self, path: str) -> Arrays:
        try:
            with np.load(io.BytesIO(self.storage.read_bytes(path)), allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: str, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"read {self.storage.url_of(path)}: it must be a whole part of an evaluation, got {error!r:.100}; remove "
            "it and run the job again, which makes it anew"
        )

    def batches(
        self, name: str, *, num_samples: int, batch_size: int, make: Callable[[slice], Arrays]
    ) -> Iterator[Arrays]:
        """Yield a set in committed batches, each made where it is not there yet.

        Args:
            name: of the set.
            num_samples: in all.
            batch_size: of a batch, the last perhaps smaller.
            make: makes the batch of a range of the set.
        """
        for index, begin in enumerate(range(0, num_samples, batch_size)):
            batch = slice(begin, min(begin + batch_size, num_samples))
            yield self.arrays(f"{name}/{index:05d}", partial(make, batch))

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part that is JSON, made and committed where it is not there yet; ArtifactError as `arrays`."""
        path = f"{STAGES}/{name}.json"
        if self.storage.find(path) is None:
            self.storage.write_json(path, make())
        try:
            return json.loads(self.storage.read_bytes(path))
        except ValueError as error:
            raise self._damaged(path, error) from error


def write_arrays(storage: Storage, name: str, arrays: Arrays) -> None:
    """Commit arrays as an uncompressed `.npz`."""
    with storage.stage(name) as staged_path, staged_path.open("wb") as file:
        # numpy's stubs know no arrays by keyword.
        np.savez(file, **arrays)  # type: ignore[arg-type]


def joined(batches: Iterator[Arrays]) -> Arrays:
    """Return the batches of a set as one: arrays end to end."""
    parts = list(batches)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _file_of(name: str) -> str:
    return f"{STAGES}/{name}.npz"
