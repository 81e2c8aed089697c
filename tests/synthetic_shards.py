"""Small shard sets with codes that are easy to learn, written by the real writer, and train specs that use them."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RulesConfig
from pipeline.ledger import Manifest, write_manifest
from pipeline.rejects import Counts
from pipeline.shards import ShardInfo, ShardSample, ShardWriter
from pipeline.storage import open_storage
from tokenization.config import TokenizerConfig, ViewsConfig, VQConfig
from tokenization.fingerprint import Fingerprint
from training.config import TrainConfig

CODEBOOK_SIZE = 16
CODES_PER_SIDE = 4
NUM_CLASSES = 4


def fingerprint_of(
    weights_sha256: str = "0" * 64, *, codebook_size: int = CODEBOOK_SIZE, codes_per_side: int = CODES_PER_SIDE
) -> Fingerprint:
    network = VQConfig(codebook_size=codebook_size, channels=32, channel_multipliers=(1, 1))
    return Fingerprint(
        weights_sha256=weights_sha256, network=network, image_size_px=2 * codes_per_side, batch_size=8, dtype="float32"
    )


def codes_of(sample_index: int, *, num_views: int, codebook_size: int, num_codes: int) -> np.ndarray:
    """A noisy ramp that starts at the label: most of it can be predicted from the code before."""
    draws = np.random.default_rng(sample_index)
    start = sample_index % NUM_CLASSES
    ramp = (start + np.arange(num_codes) * (1 + np.arange(num_views)[:, None])) % codebook_size
    noise = draws.integers(0, codebook_size, ramp.shape)
    return np.where(draws.random(ramp.shape) < 0.1, noise, ramp).astype(np.uint16)


def write_shard_set(
    run_dir: Path,
    *,
    samples_per_shard: tuple[int, ...] = (40, 24, 33),
    num_views: int = 1,
    fingerprint: Fingerprint | None = None,
    first_sample: int = 0,
    label: Any = "of_sample",
) -> Path:
    """Write a committed shard set; sample i has codes `codes_of(first_sample + i)` and label i % 4, or `label`."""
    fingerprint = fingerprint or fingerprint_of()
    codebook_size = fingerprint.network.codebook_size
    num_codes = (fingerprint.image_size_px // fingerprint.network.patch_px) ** 2
    (run_dir / "shards").mkdir(parents=True)
    shards: list[ShardInfo] = []
    index = first_sample
    for shard, num_samples in enumerate(samples_per_shard):
        path = run_dir / "shards" / f"{shard:05d}.tar"
        with ShardWriter(path, codebook_size=codebook_size) as writer:
            for position in range(num_samples):
                codes = codes_of(index, num_views=num_views, codebook_size=codebook_size, num_codes=num_codes)
                metadata = {"caption": None, "label": index % NUM_CLASSES if label == "of_sample" else label}
                writer.add(ShardSample(key=f"{shard:05d}{position:04d}", codes_VT=codes, metadata=metadata))
                index += 1
            written = writer.close()
        path.with_name(f"{path.name}.idx").write_bytes(written.index)
        shards.append(written.info(path.name))
    return write_manifest_of(run_dir, shards, num_views=num_views, fingerprint=fingerprint)


def damage_samples(shards: Path, *keys: str, num_views: int = 1) -> None:
    """Put a code that is not in the codebook into each view of the samples of shard 00000 that have these keys."""
    shard = shards / "shards" / "00000.tar"
    data = bytearray(shard.read_bytes())
    view_bytes = 2 * CODES_PER_SIDE**2  # uint16
    for key in keys:
        start = data.index(f"{key}.codes.npy".encode()) + 512 + 128
        for view in range(num_views):
            data[start + view * view_bytes] = CODEBOOK_SIZE
    shard.write_bytes(bytes(data))


def train_config(run_dir: Path, *, shards: Path, **changes: Any) -> TrainConfig:
    """A train spec of seconds; `changes` are dotted fields with double underscores: `engine__zero_stage=3`."""
    spec: dict[str, Any] = {
        "kind": "train",
        "run_dir": str(run_dir),
        "data": {"shards": str(shards), "shuffle_window_shards": 2, "seed": 3},
        "model": {
            "num_layers": 2,
            "num_heads": 2,
            "model_dim": 32,
            "codebook_size": CODEBOOK_SIZE,
            "codes_per_side": CODES_PER_SIDE,
            "num_classes": NUM_CLASSES,
            "window_size": 4,
        },
        "noise": {"own_draft_fraction": 0.3, "offset_weights": [1, 0.5, 0.5, 0.5]},
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 3},
        "engine": {"zero_stage": 2, "dtype": "bfloat16", "global_batch_size": 16},
        "checkpoint": {"every_n_steps": 4},
        "num_steps": 12,
        "log_every_n_steps": 1,
        "seed": 5,
    }
    for name, value in changes.items():
        *parents, field = name.split("__")
        section = spec
        for parent in parents:
            section = section.setdefault(parent, {})
        section[field] = value
    return TrainConfig.model_validate(spec)


def write_manifest_of(
    run_dir: Path,
    shards: list[ShardInfo],
    *,
    num_views: int,
    fingerprint: Fingerprint | None = None,
    codebook_size: int = CODEBOOK_SIZE,
    codes_per_side: int = CODES_PER_SIDE,
) -> Path:
    """Write the manifest of shards that stand in `run_dir`; the last two are for a fingerprint that is not given."""
    fingerprint = fingerprint or fingerprint_of(codebook_size=codebook_size, codes_per_side=codes_per_side)
    total = sum(shard.num_samples for shard in shards)
    counts = Counts(
        num_read=total, num_written=total, num_dropped=0, num_rejected=0, dropped_by_reason={}, rejected_by_reason={}
    )
    manifest = Manifest(
        fingerprint=fingerprint,
        tokenizer=TokenizerConfig(weights="synthetic"),
        views=ViewsConfig(),
        rules=RulesConfig(),
        num_samples=total,
        num_views=num_views,
        codes_per_image=(fingerprint.image_size_px // fingerprint.network.patch_px) ** 2,
        class_names=None,
        shards=shards,
        poison_units=[],
        totals=counts,
    )
    write_manifest(open_storage(str(run_dir)), manifest)
    return run_dir
