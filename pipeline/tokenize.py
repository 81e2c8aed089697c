"""The tokenize job: plan, skip what is finished, let a pool of Ray workers do the rest, write the manifest.

The invariant: workers commit units, this process commits poison and, last, the manifest; all may be killed at any
moment and a rerun ends in the same bytes. A unit that keeps failing is set aside and does not stop the others.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing

from pipeline.cluster import ray_session
from pipeline.config import TokenizeConfig
from pipeline.gathered import Ledger
from pipeline.ledger import (
    MANIFEST_NAME,
    LedgerRecord,
    Manifest,
    PoisonRecord,
    poison_name,
    record_name,
    stem_of,
    write_manifest,
    write_poison,
)
from pipeline.pool import Poison, PoolState, WorkerPool
from pipeline.progress import LiveProgress
from pipeline.rejects import Counts
from pipeline.resume import Found, check_identity, find_finished, with_begun_keys
from pipeline.retry import (
    PlannedRetry,
    RetryDetails,
    RetrySource,
    append_units,
    plan_retries,
    with_retries,
    write_planned,
)
from pipeline.sidecars import remove_sidecars, write_sidecars
from pipeline.sources.plan import Plan
from pipeline.sources.registry import make_source
from pipeline.status import StatusFile
from pipeline.storage import ArtifactError, Storage, open_storage
from pipeline.tally import Tally
from pipeline.worker import Finished
from tokenization.messages import named
from tokenization.tokenizer import Tokenizer

MIN_SAMPLES_TO_JUDGE = 10_000
"""Samples read before the share of rejects may end a running job."""
MAX_NAMED_UNITS = 3
MAX_INVISIBLE_S, VISIBLE_POLL_S = 60.0, 1.0
"""How long a network file system may hide what another machine has written, and how often it is looked for."""

logger = logging.getLogger(__name__)


def run_tokenize(config: TokenizeConfig, *, progress: bool = True) -> Manifest:
    """Tokenize a corpus, or what is left of it, and return the manifest of the shard set.

    Args:
        config: the job.
        progress: whether a terminal gets a live bar.

    Raises:
        ArtifactError: the input or the directory cannot be used, more than `max_poison_units` units failed, nothing
            was written, or more samples than `max_rejected_fraction` were rejected.
    """
    return _Job(config, progress=progress).run(retry_rejects=False)


def retry_rejects(config: TokenizeConfig, *, progress: bool = True) -> Manifest:
    """Try the rejects of a set whose units are all done again, in appended units, and return the new manifest.

    A retry that was killed goes on, with the samples and the limit that it was begun with.

    Args:
        config: the job that made the set; only `max_image_pixels` may have been raised since.
        progress: whether a terminal gets a live bar.

    Raises:
        ArtifactError: as `run_tokenize`; or a unit of the source is not done.
    """
    return _Job(config, progress=progress).run(retry_rejects=True)


class _Job:
    """One run of a tokenize job over its directory."""

    def __init__(self, config: TokenizeConfig, *, progress: bool) -> None:
        self._config, self._show_progress = config, progress
        self._storage = open_storage(config.run_dir, s3=config.s3)
        self._source = make_source(config.source, s3=config.s3)

    def run(self, *, retry_rejects: bool) -> Manifest:
        config, storage = self._config, self._storage
        logger.info("tokenize %s: planning", storage)
        source_plan = self._source.plan()
        tokenizer = Tokenizer.load(config.tokenizer)
        with storage.exclusive():
            num_leftovers = storage.remove_staged()
            source_plan = with_begun_keys(storage, source_plan)
            begun_with = check_identity(
                storage,
                config=config,
                plan=source_plan,
                fingerprint=tokenizer.fingerprint,
                free=("max_image_pixels",) if retry_rejects else (),
            )
            plan, planned = with_retries(storage, source_plan), list[PlannedRetry]()
            if retry_rejects:
                planned = self._plan_retries(plan)
                plan = append_units(plan, planned)
                # The limit of the retry is in its units; any other unit that is done again keeps its own.
                of_set = {"max_image_pixels": begun_with["max_image_pixels"]}
                config = self._config = config.model_copy(update=of_set)
            ledger = Ledger(storage)
            found = find_finished(
                storage,
                config=config,
                plan=plan,
                source=RetrySource(self._source),
                fingerprint_digest=tokenizer.fingerprint.digest,
                ledger=ledger,
            )
            write_planned(storage, planned, keys=plan.keys)
            logger.info(
                "tokenize %s: units=%d finished=%d leftovers_removed=%d",
                storage,
                len(plan.units),
                found.tally.num_units,
                num_leftovers,
            )
            poison = self._work(plan, tokenizer=tokenizer, ledger=ledger, found=found)
            return self._finish(plan, tokenizer=tokenizer, tally=found.tally, poison=poison)

    def _plan_retries(self, plan: Plan) -> list[PlannedRetry]:
        """Return the units to append; none where a retry before was killed, which goes on instead."""
        storage = self._storage
        if storage.find(MANIFEST_NAME) is None:
            recorded = {stem_of(name) for name in storage.list("ledger/") if name.endswith(".json")}
            waiting = [unit for unit in plan.units if plan.keys.stem(unit.unit_index) not in recorded]
            num_appended = sum(isinstance(unit.details, RetryDetails) for unit in waiting)
            if num_appended:
                logger.info("tokenize %s: appended_units_to_do=%d, of a retry before", storage, num_appended)
                return []
            if waiting:
                raise ArtifactError(
                    f"retry rejects of {storage}: every unit must have a ledger record, got none of {len(waiting)} of "
                    f"{len(plan.units)} units; run its job first"
                )
            # Not so where the retry itself has ended the job: then the rejects that it left are tried again.
            totals = Ledger(storage).tally().totals()
            is_done = _totals_problem(storage, totals, limit=self._config.max_rejected_fraction) is None
            if is_done and any(isinstance(unit.details, RetryDetails) for unit in plan.units):
                logger.info("tokenize %s: a retry before has done its units, and lacks the manifest", storage)
                return []
        planned = plan_retries(storage, plan, max_image_pixels=self._config.max_image_pixels)
        logger.info("tokenize %s: rejects_to_retry=%d", storage, sum(len(one.keys) for one in planned))
        return planned

    def _work(self, plan: Plan, *, tokenizer: Tokenizer, ledger: Ledger, found: Found) -> list[Poison]:
        """Commit every unit that the tally lacks, add it, and return those that were set aside instead."""
        storage, config, tally = self._storage, self._config, found.tally
        known_poison = self._known_poison(tally)
        waiting = [unit for unit in plan.units if unit.unit_index not in tally]
        if not waiting:
            return []
        storage.remove(MANIFEST_NAME)  # like the sidecars, it would speak of shards that are about to be replaced
        remove_sidecars(storage)
        storage.remove_all(found.uncommitted)
        is_retry = any(isinstance(unit.details, RetryDetails) for unit in waiting)
        poison: list[Poison] = []
        pool = WorkerPool(config, keys=plan.keys, fingerprint_digest=tokenizer.fingerprint.digest)
        live = LiveProgress(num_units=len(plan.units), num_units_done=tally.num_units, show=self._show_progress)
        with live, StatusFile(storage) as status, ray_session(config.cluster), closing(pool.run(waiting)) as events:
            for event in events:
                if isinstance(event, Finished):
                    stem = plan.keys.stem(event.record.unit_index)
                    self._check_is_here(stem, event.record)
                    if stem in known_poison:
                        storage.remove(poison_name(stem))
                    ledger.note(stem, event.record, mark=event.record_mark)
                    tally.add(event.record)
                    live.add_unit(event.record.counts)
                    if not is_retry:  # else all that is about to be written would still count as rejected
                        self._judge_rejects(tally.totals())
                elif isinstance(event, Poison):
                    self._set_aside(event, plan=plan)
                    poison.append(event)
                else:
                    assert isinstance(event, PoolState)
                    live.show(event)
                    status.write(event, samples_per_s=live.samples_per_s, eta_s=live.eta_s)
            ledger.gather()
        storage.remove_staged()  # of workers that were killed
        return poison

    def _known_poison(self, tally: Tally) -> set[str]:
        """Return the digits of the units that were set aside, but for those done since by a job that was killed."""
        stems = {stem_of(name) for name in self._storage.list("poison/")}
        done = {stem for stem in stems if stem.isdigit() and int(stem) in tally}
        for stem in done:
            self._storage.remove(poison_name(stem))
        return stems - done

    def _check_is_here(self, stem: str, record: LedgerRecord) -> None:
        """Raise ArtifactError where a worker has written into another directory than this process sees."""
        deadline_s = time.monotonic() + MAX_INVISIBLE_S
        while self._storage.find(record_name(stem)) is None:
            if time.monotonic() > deadline_s:
                raise ArtifactError(
                    f"tokenize {self._storage}: what workers write must be seen by the job, got nothing of unit "
                    f"{record.unit_index} ({record.unit}); set run_dir to a directory that every machine mounts, or to "
                    "an s3:// URL"
                )
            time.sleep(VISIBLE_POLL_S)

    def _set_aside(self, poison: Poison, *, plan: Plan) -> None:
        unit = poison.unit
        record = PoisonRecord(unit_index=unit.unit_index, unit=unit.name, problems=list(poison.problems))
        logger.error("unit %d (%s) is set aside: %s", unit.unit_index, unit.name, poison.problems[-1])
        write_poison(self._storage, plan.keys.stem(unit.unit_index), record)

    def _judge_rejects(self, totals: Counts) -> None:
        """Raise ArtifactError where so many samples were rejected that going on makes no sense."""
        limit = self._config.max_rejected_fraction
        if totals.num_read >= MIN_SAMPLES_TO_JUDGE and totals.num_rejected > limit * totals.num_read:
            raise ArtifactError(_too_many_rejects(self._storage, totals, limit=limit))

    def _finish(self, plan: Plan, *, tokenizer: Tokenizer, tally: Tally, poison: list[Poison]) -> Manifest:
        config, storage = self._config, self._storage
        set_aside = sorted(one.unit.unit_index for one in poison)
        manifest = make_manifest(config, plan=plan, tokenizer=tokenizer, tally=tally, poison=set_aside)
        if len(poison) > config.max_poison_units:
            raise ArtifactError(self._too_much_poison(plan, poison))
        problem = _totals_problem(storage, manifest.totals, limit=config.max_rejected_fraction)
        if problem is not None:
            raise ArtifactError(problem)
        write_sidecars(storage, manifest)
        write_manifest(storage, manifest)
        totals = manifest.totals
        logger.info(
            "tokenize %s: shards=%d written=%d dropped=%d rejected=%d poison_units=%d",
            storage,
            len(manifest.shards),
            totals.num_written,
            totals.num_dropped,
            totals.num_rejected,
            len(poison),
        )
        return manifest

    def _too_much_poison(self, plan: Plan, poison: list[Poison]) -> str:
        units = [f"unit {one.unit.unit_index} ({one.unit.name}): {one.problems[-1]}" for one in poison]
        return (
            f"tokenize {self._storage}: at most {self._config.max_poison_units} of {len(plan.units)} units may fail, "
            f"got {len(poison)}: {named(units, most=MAX_NAMED_UNITS, separator='; ')}; mend the cause and rerun "
            "(finished units are kept), or raise max_poison_units to leave them out"
        )


def make_manifest(
    config: TokenizeConfig, *, plan: Plan, tokenizer: Tokenizer, tally: Tally, poison: list[int]
) -> Manifest:
    """Return the manifest of a set from the tally of its ledger; pure."""
    totals = tally.totals()
    return Manifest(
        fingerprint=tokenizer.fingerprint,
        tokenizer=config.tokenizer,
        views=config.views,
        rules=config.rules,
        num_samples=totals.num_written,
        num_views=config.views.num_views,
        codes_per_image=tokenizer.codes_per_image,
        class_names=None if plan.class_names is None else list(plan.class_names),
        shards=tally.shards_in_order(),
        poison_units=poison,
        totals=totals,
    )


def _totals_problem(storage: Storage, totals: Counts, *, limit: float) -> str | None:
    """Return why samples that went there make no finished set, or None."""
    if totals.num_rejected > limit * totals.num_read:
        return _too_many_rejects(storage, totals, limit=limit)
    if totals.num_written == 0:
        return (
            f"tokenize {storage}: a set must hold samples, got none of {totals.num_read} (rejected: "
            f"{_reasons(totals)}; dropped: {totals.num_dropped}); check source and rules, or mend the rejects and run "
            "tensorar retry-rejects"
        )
    return None


def _too_many_rejects(storage: Storage, totals: Counts, *, limit: float) -> str:
    return (
        f"tokenize {storage}: at most {limit:.1%} of the samples may be rejected, got {totals.num_rejected} of "
        f"{totals.num_read} ({_reasons(totals)}); see rejects/ or raise max_rejected_fraction"
    )


def _reasons(totals: Counts) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in totals.rejected_by_reason.items()) or "none"
