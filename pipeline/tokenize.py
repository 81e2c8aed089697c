"""The tokenize job: plan, skip what is finished, let a pool of Ray workers do the rest, write the manifest.

The invariant: workers commit units, this process commits only the manifest, last; both may be killed at any moment and
a rerun ends in the same bytes. A unit that keeps failing fails the job, after all others are done.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.cluster import ray_session
from pipeline.config import TokenizeConfig
from pipeline.ledger import LedgerRecord, Manifest, write_manifest
from pipeline.local_storage import exclusive, local_path, remove, remove_staged
from pipeline.pool import WorkerPool
from pipeline.progress import LiveProgress
from pipeline.rejects import add_counts
from pipeline.resume import check_identity, find_finished
from pipeline.sources.plan import Plan
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError
from tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def run_tokenize(config: TokenizeConfig, *, progress: bool = True) -> Manifest:
    """Tokenize a corpus, or what is left of it, and return the manifest of the shard set.

    Args:
        config: the job.
        progress: whether a terminal gets a live bar.

    Raises:
        ArtifactError: the input or the directory cannot be used, a unit failed `max_attempts` times, nothing was
            written, or more samples than `max_rejected_fraction` were rejected.
    """
    run_dir = local_path(config.run_dir)
    logger.info("tokenize %s: planning", run_dir)
    source = make_source(config.source, s3=config.s3)
    the_plan = source.plan()
    tokenizer = Tokenizer.load(config.tokenizer)
    with exclusive(run_dir):
        num_leftovers = remove_staged(run_dir)
        check_identity(run_dir, config=config, plan=the_plan, fingerprint=tokenizer.fingerprint)
        records = find_finished(run_dir, source=source, plan=the_plan, fingerprint_digest=tokenizer.fingerprint.digest)
        logger.info(
            "tokenize %s: units=%d finished=%d leftovers_removed=%d",
            run_dir,
            len(the_plan.units),
            len(records),
            num_leftovers,
        )
        waiting = [unit for unit in the_plan.units if unit.unit_index not in records]
        if waiting:
            remove(run_dir / "manifest.json")  # it would speak of shards that are about to be replaced
            with (
                LiveProgress(num_units=len(the_plan.units), num_units_done=len(records), show=progress) as live,
                ray_session(config.cluster),
            ):
                digest = tokenizer.fingerprint.digest
                pool = WorkerPool(config, the_plan=the_plan, fingerprint_digest=digest, live=live)
                records |= pool.run(waiting)
            remove_staged(run_dir)
        manifest = make_manifest(config, the_plan, tokenizer, [records[index] for index in sorted(records)])
        _check_totals(run_dir, manifest, config=config)
        write_manifest(run_dir, manifest)
    logger.info(
        "tokenize %s: shards=%d written=%d dropped=%d rejected=%d",
        run_dir,
        len(manifest.shards),
        manifest.totals.num_written,
        manifest.totals.num_dropped,
        manifest.totals.num_rejected,
    )
    return manifest


def make_manifest(
    config: TokenizeConfig, the_plan: Plan, tokenizer: Tokenizer, records: list[LedgerRecord]
) -> Manifest:
    """Return the manifest of a set from its records, in the order of their units; pure."""
    totals = add_counts([record.counts for record in records])
    return Manifest(
        fingerprint=tokenizer.fingerprint,
        tokenizer=config.tokenizer,
        views=config.views,
        rules=config.rules,
        num_samples=totals.num_written,
        num_views=config.views.num_views,
        codes_per_image=tokenizer.codes_per_image,
        class_names=None if the_plan.class_names is None else list(the_plan.class_names),
        shards=[record.shard for record in records if record.shard is not None],
        totals=totals,
    )


def _check_totals(run_dir: Path, manifest: Manifest, *, config: TokenizeConfig) -> None:
    totals = manifest.totals
    reasons = ", ".join(f"{reason} {number}" for reason, number in totals.rejected_by_reason.items()) or "none"
    if totals.num_rejected > config.max_rejected_fraction * totals.num_read:
        raise ArtifactError(
            f"tokenize {run_dir}: at most {config.max_rejected_fraction:.1%} of the samples may be rejected, got "
            f"{totals.num_rejected} of {totals.num_read} ({reasons}); see rejects/ or raise max_rejected_fraction"
        )
    if totals.num_written == 0:
        raise ArtifactError(
            f"tokenize {run_dir}: a set must hold samples, got none of {totals.num_read} (rejected: {reasons}; "
            f"dropped: {totals.num_dropped}); check source and rules"
        )
