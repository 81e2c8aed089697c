"""Checkpoints on a real S3 server: the record is the commit."""

from synthetic_checkpoints import flip_a_bit, prepare, write_checkpoint

from pipeline.storage import open_storage
from training.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    newest_whole_checkpoint,
    remove_old_checkpoints,
    remove_partial,
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
