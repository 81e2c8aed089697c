"""Checkpoints on a real S3 server: the record is the commit."""

import tracemalloc

from synthetic_checkpoints import flip_a_bit, prepare, record_of, write_checkpoint

from pipeline.storage import open_storage, sha256_of
from training.checkpoint import (
    FileRecord,
    checkpoint_name,
    commit_checkpoint,
    list_checkpoints,
    newest_whole_checkpoint,
    remove_old_checkpoints,
    remove_partial,
    verify_checkpoint,
)


def test_on_s3_a_checkpoint_is_what_has_a_record_and_the_rest_is_removed(s3_url: str) -> None:
    storage = open_storage(s3_url)
    for step in (4, 8, 12):
        write_checkpoint(storage, step)
    prepare(storage, 16)
    remove_old_checkpoints(storage, keep_latest=2, keep_every_n_steps=None, newest_step=12)
    assert list_checkpoints(storage) == [8, 12]
    flip_a_bit(storage, f"{checkpoint_name(12)}/rank_00001.safetensors")
    newest = newest_whole_checkpoint(storage)
    assert newest is not None
    assert newest.step == 8
    remove_partial(storage)
    directories = {name.split("/")[1] for name in storage.list("checkpoints/")}
    assert directories == {"step_00000008", "step_00000012"}


def test_verifying_a_large_file_on_s3_holds_a_part_of_it(s3_url: str) -> None:
    storage, data = open_storage(s3_url), bytes(96 << 20)
    name = "rank_00000.safetensors"
    storage.write_bytes(f"{checkpoint_name(8)}/{name}", data)
    files = (FileRecord(name=name, num_bytes=len(data), sha256=sha256_of(data)),)
    commit_checkpoint(storage, record_of(8).model_copy(update={"files": files}))
    tracemalloc.start()
    try:
        assert verify_checkpoint(storage, 8) == []
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 48 << 20  # two blocks of 8 MiB, and what they are read into
