"""Checkpoints of a few bytes, committed as a run commits them, and ways to damage a file of a storage."""

from synthetic_shards import fingerprint_of

from pipeline.storage import Storage, sha256_of
from training.checkpoint import CheckpointRecord, FileRecord, commit_checkpoint, prepared_name

FILES = {"rank_00000.safetensors": b"weights" * 100, "rank_00001.safetensors": b"moments" * 300}


def record_of(step: int) -> CheckpointRecord:
    files = [(name, data + str(step).encode()) for name, data in FILES.items()]
    return CheckpointRecord(
        step=step,
        samples_consumed=step * 16,
        num_skipped_steps=1,
        optimizer_steps=step - 1,
        world_size=2,
        zero_stage=2,
        kinds=("weights",),
        shapes={"a": (3, 4)},
        fingerprint=fingerprint_of(),
        spec={"kind": "train"},
        packages={"torch": "2"},
        files=tuple(FileRecord(name=name, num_bytes=len(data), sha256=sha256_of(data)) for name, data in files),
    )


def prepare(storage: Storage, step: int) -> None:
    for name, data in FILES.items():
        storage.write_bytes(f"{prepared_name(storage, step)}/{name}", data + str(step).encode())
        storage.write_bytes(f"{prepared_name(storage, step)}/{name}.report.json", b"{}")


def write_checkpoint(storage: Storage, step: int) -> None:
    prepare(storage, step)
    commit_checkpoint(storage, record_of(step))


def truncate(storage: Storage, name: str) -> None:
    storage.write_bytes(name, storage.read_bytes(name)[:-3])


def flip_a_bit(storage: Storage, name: str) -> None:
    data = bytearray(storage.read_bytes(name))
    data[len(data) // 2] ^= 1
    storage.write_bytes(name, bytes(data))


def remove(storage: Storage, name: str) -> None:
    storage.remove(name)
