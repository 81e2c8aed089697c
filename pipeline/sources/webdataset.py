"""WebDataset tars: one tar is one work unit, so a plan costs a listing and no tar is opened.

The invariant: the order is that of `urls`. Keys are as wide as the largest tar could need, a tar spending at least a
header block on a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import S3Config, WebDatasetConfig
from pipeline.sources.fields import printable
from pipeline.sources.plan import Plan, Source, WorkUnit, fingerprint_of, make_plan, mark_of
from pipeline.sources.sample import InputSample, UnusableSampleError
from pipeline.sources.tar_samples import make_sample, read_groups
from pipeline.sources.urls import list_files, read_class_names

MIN_BYTES_PER_SAMPLE = 512


@dataclass(frozen=True, slots=True)
class TarFile:
    """What a unit's `details` are: its URL, and what labels must be below (None if the classes are not known)."""

    url: str
    num_classes: int | None


class WebDatasetSource(Source):
    """Tars of `KEY.jpg` (or another image), `KEY.txt`, `KEY.json` and `KEY.cls`."""

    def __init__(self, config: WebDatasetConfig, *, s3: S3Config) -> None:
        """Keep the config; touches no file."""
        self._config, self._s3 = config, s3

    def plan(self) -> Plan:
        """See `Source.plan`."""
        class_names = read_class_names(self._config.class_names, s3=self._s3)
        num_classes = None if class_names is None else len(class_names)
        files = list_files(self._config.urls, urls_file=self._config.urls_file, s3=self._s3)
        units = [
            WorkUnit(
                unit_index=unit_index,
                name=printable(file.base_name),
                fingerprint=fingerprint_of([(file.base_name, file.info.num_bytes)]),
                mark=mark_of([file.info]),
                details=TarFile(file.url, num_classes),
            )
            for unit_index, file in enumerate(files)
        ]
        largest = max(file.info.num_bytes for file in files)
        return make_plan(units, max_samples_per_unit=largest // MIN_BYTES_PER_SAMPLE, class_names=class_names)

    def read(self, unit: WorkUnit) -> Iterator[InputSample]:
        """See `Source.read`."""
        tar: TarFile = unit.details
        seen: set[str] = set()
        for position, (key, members) in enumerate(read_groups(tar.url, s3=self._s3)):
            source = printable(key)
            try:
                if key in seen:
                    raise UnusableSampleError("duplicate_key", "the key stands at two places of the tar")
                yield make_sample(
                    members,
                    position=position,
                    source=source,
                    caption_field=self._config.caption_field,
                    label_field=self._config.label_field,
                    num_classes=tar.num_classes,
                )
            except UnusableSampleError as error:
                yield InputSample(position=position, source=source, extra={}, problem=error.problem)
            seen.add(key)
