"""An output folder of img2dataset in its webdataset format: NNNNN.tar with NNNNN.parquet and NNNNN_stats.json.

The invariant: a unit is a tar whose `_stats.json`, img2dataset's commit marker, is there; and its samples are the rows
of the Parquet sidecar, each once: first the tar's, in its order, then those that the sidecar names and the tar lacks.
A row that was never downloaded is dropped (stage `rule`), since the corpus itself says that it has no image; a
disagreement of the two files is a reject.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pipeline.config import Img2DatasetConfig, S3Config
from pipeline.rejects import RULE_STAGE
from pipeline.sources.fields import checked_caption, checked_label, parse_caption, printable
from pipeline.sources.img2dataset_sidecar import SUCCESS, Sidecar, read_sidecar
from pipeline.sources.plan import Plan, Source, WorkUnit, fingerprint_of, make_plan, mark_of
from pipeline.sources.sample import InputSample, UnusableSampleError
from pipeline.sources.tar_samples import Members, read_groups, split_members
from pipeline.storage import ArtifactError, FileInfo, next_action, open_storage
from tokenization.messages import named

TAR, SIDECAR, STATS = ".tar", ".parquet", "_stats.json"
MIN_BYTES_PER_SAMPLE = 512
MAX_NAMED_SHARDS = 8
_FILE_NAME = re.compile(r"(\d+)([.]tar|[.]parquet|_stats[.]json)")

Shards = dict[str, dict[str, FileInfo]]
"""The files of each shard by their endings, by the shard's number."""


class Img2DatasetSource(Source):
    """What img2dataset downloaded, and what it did not."""

    def __init__(self, config: Img2DatasetConfig, *, s3: S3Config) -> None:
        """Keep the config; touches no file."""
        self._config, self._s3 = config, s3
        self._storage = open_storage(config.root, s3=s3)

    def plan(self) -> Plan:
        """See `Source.plan`."""
        shards = self._finished_shards()
        units: list[WorkUnit] = []
        for stem, files in shards.items():
            unit = WorkUnit(
                unit_index=len(units),
                name=stem + TAR,
                fingerprint=fingerprint_of((stem + ending, files[ending].num_bytes) for ending in (TAR, SIDECAR)),
                mark=mark_of((files[TAR], files[SIDECAR])),
                details=stem,
            )
            units.append(unit)
        read_sidecar(self._storage, units[0].details, config=self._config)  # a wrong column is known at once
        return make_plan(units, max_samples_per_unit=max(map(_max_samples, shards.values())), class_names=None)

    def read(self, unit: WorkUnit) -> Iterator[InputSample]:
        """See `Source.read`."""
        stem: str = unit.details
        sidecar = read_sidecar(self._storage, stem, config=self._config)
        self._check_stats(stem, sidecar)
        seen: set[str] = set()
        position = 0
        for key, members in read_groups(self._storage.url_of(stem + TAR), s3=self._s3):
            source = printable(key)
            try:
                if key in seen:
                    raise UnusableSampleError("duplicate_key", "the key stands at two places of the tar")
                yield _make_sample(
                    members, position=position, source=source, row=sidecar.row_of.get(key), sidecar=sidecar
                )
            except UnusableSampleError as error:
                yield InputSample(position=position, source=source, extra={}, problem=error.problem)
            seen.add(key)
            position += 1
        for key, row in sidecar.row_of.items():
            if key not in seen:
                problem = _missing_in_tar(sidecar, row).problem
                yield InputSample(position=position, source=printable(key), extra={}, problem=problem)
                position += 1

    def _finished_shards(self) -> Shards:
        """Return the shards whose commit marker is there, in order; by default all must be.

        Raises:
            ArtifactError: there is none, or an unfinished one, or one that lacks a file.
        """
        found: dict[str, dict[str, FileInfo]] = {}
        for name, info in self._storage.list().items():
            if match := _FILE_NAME.fullmatch(name):
                found.setdefault(match[1], {})[match[2]] = info
        finished = {stem: files for stem, files in sorted(found.items()) if STATS in files}
        unfinished = [stem for stem, files in sorted(found.items()) if STATS not in files]
        if unfinished and not self._config.allow_unfinished:
            raise ArtifactError(
                f"plan source: every shard of {self._storage} must have its _stats.json, got {len(unfinished)} "
                f"without: {named(unfinished, most=MAX_NAMED_SHARDS)}; let img2dataset finish, or leave them out with "
                "allow_unfinished: true"
            )
        incomplete = [stem for stem, files in finished.items() if len(files) < 3]
        if incomplete:
            raise ArtifactError(
                f"plan source: every _stats.json of {self._storage} must have its .tar and .parquet, got "
                f"{len(incomplete)} without: {named(incomplete, most=MAX_NAMED_SHARDS)}; let img2dataset write these "
                "shards again"
            )
        if not finished:
            raise ArtifactError(
                f"plan source: {self._storage} must hold NNNNN.tar, NNNNN.parquet and NNNNN_stats.json, got none; "
                "check source.root, and that img2dataset ran with output_format webdataset"
            )
        return finished

    def _check_stats(self, stem: str, sidecar: Sidecar) -> None:
        """Check that sidecar and marker are of one run of img2dataset."""
        where = self._storage.url_of(stem + STATS)
        try:
            stats = json.loads(self._storage.read_bytes(stem + STATS))
            expected = (stats["count"], stats["successes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            action = next_action(error, otherwise="let img2dataset write the shard again")
            raise ArtifactError(f"read {where}: must be img2dataset's JSON, got {error!r}; {action}") from error
        got = (len(sidecar.row_of), sum(status == SUCCESS for status in sidecar.statuses))
        if got != expected:
            raise ArtifactError(
                f"read {where}: count and successes must be those of the sidecar, got {expected} for {got}; let "
                "img2dataset write the shard again"
            )


def _make_sample(members: Members, *, position: int, source: str, row: int | None, sidecar: Sidecar) -> InputSample:
    if row is None:
        raise UnusableSampleError("not_in_sidecar", "the tar holds the key, the .parquet does not")
    if sidecar.statuses[row] != SUCCESS:
        raise UnusableSampleError("sidecar_disagrees", f"the tar holds it, the .parquet says {sidecar.statuses[row]}")
    image, texts = split_members(members)
    caption = sidecar.caption(row)
    if caption is None and "txt" in texts:
        caption = parse_caption(texts["txt"])
    return InputSample(
        position=position,
        source=source,
        data=image,
        caption=checked_caption(caption),
        label=checked_label(sidecar.label(row), num_classes=None),
        extra=sidecar.extra(row),
    )


def _missing_in_tar(sidecar: Sidecar, row: int) -> UnusableSampleError:
    """Return why a row has no sample: never downloaded, which is no failure of ours, or lost since."""
    status = sidecar.statuses[row]
    if status == SUCCESS:
        return UnusableSampleError("not_in_tar", "the .parquet says success, the tar lacks the key")
    detail = str(sidecar.errors[row] or "")
    return UnusableSampleError(f"img2dataset_{status or 'no_status'}", detail, stage=RULE_STAGE)


def _max_samples(files: dict[str, FileInfo]) -> int:
    """Return an upper bound of a shard's rows: one that failed has no byte in the tar, but some in the sidecar."""
    return files[TAR].num_bytes // MIN_BYTES_PER_SAMPLE + files[SIDECAR].num_bytes
