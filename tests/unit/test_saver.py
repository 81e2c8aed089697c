"""A save as each rank does it: whole or not there at all."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_calls import record_disk_calls
from stand_in_engine import engine_of, equal, partition_of, states_of
from synthetic_checkpoints import record_of
from synthetic_shards import fingerprint_of, train_config

from pipeline.local_storage import LocalStorage
from pipeline.storage import ArtifactError
from training.checkpoint import (
    CheckpointRecord,
    RunState,
    SetRecord,
    checkpoint_name,
    list_checkpoints,
    newest_whole_checkpoint,
    read_record,
)
from training.config import TrainConfig
from training.fragment_file import FragmentFile, FragmentLayout
from training.fragments import Fragments, parameter_shapes
from training.ranks import Ranks
from training.resume import resume_engine
from training.saver import CheckpointWriter, _Write

STATE = RunState(step=8, samples_consumed=128, num_skipped_steps=2, num_replaced_samples=3)


def config_of(run_dir: Path, **changes: Any) -> TrainConfig:
    return train_config(run_dir, shards=run_dir / "set", **changes)


def ranks_of(rank: int, world_size: int) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))


class TwoSaves:
    """The save of step 8 on two ranks, of a parameter `a` of twelve elements, each rank holding a half."""

    def __init__(self, run_dir: Path, *, token: str = "ours", **changes: Any) -> None:
        self.storage = LocalStorage(run_dir)
        config = config_of(run_dir, **changes)
        self.first, self.second = (
            _Write(config, storage=self.storage, ranks=ranks_of(rank, 2), token=token, state=STATE) for rank in (0, 1)
        )
        self.record = record_of(8).model_copy(update={"files": ()})

    def write(self, save: _Write, start: int, end: int) -> None:
        save.write_file(
            FragmentLayout(kinds=("weights",), fragments={"a": (start, end)}),
            [np.arange(start, end, dtype=np.float32)],
        )


def test_the_files_of_all_ranks_are_committed_in_rank_order_whoever_is_first(tmp_path: Path) -> None:
    saves = TwoSaves(tmp_path)
    saves.write(saves.second, 6, 12)
    thread = threading.Thread(target=saves.first.commit, args=(saves.record,))
    thread.start()
    time.sleep(0.1)  # it has read the one report and waits for the other
    saves.write(saves.first, 0, 6)
    thread.join()
    assert [file.name for file in read_record(saves.storage, 8).files] == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    whole = newest_whole_checkpoint(saves.storage)
    assert whole is not None
    assert whole.step == 8
    for rank, start in ((0, 0), (1, 6)):
        file = FragmentFile(saves.storage, f"{checkpoint_name(8)}/rank_{rank:05d}.safetensors")
        first, values = file.read("weights")["a"]
        assert (first, values.tolist()) == (start, list(range(start, start + 6)))
    assert sorted(path.name for path in (tmp_path / checkpoint_name(8)).iterdir()) == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
        "record.json",
    ]


def test_a_rank_whose_report_is_read_before_its_write_returns_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = TwoSaves(tmp_path)
    saves.write(saves.first, 0, 6)
    for name in ("replace", "rename"):
        rename = getattr(os, name)

        def watched(old: Path, new: Path, rename: Callable[[Path, Path], None] = rename) -> None:
            rename(old, new)
            if Path(new).name == "rank_00001.ours.json":
                saves.first.commit(saves.record)  # which takes away the directory that the report is in

        monkeypatch.setattr(os, name, watched)
    saves.write(saves.second, 6, 12)
    assert list_checkpoints(saves.storage) == [8]


def test_a_rank_that_never_reports_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    saves = TwoSaves(tmp_path, engine__step_timeout_s=0.1)
    saves.write(saves.first, 0, 6)
    with pytest.raises(ArtifactError, match=r"within engine\.step_timeout_s = 0\.1 s of rank 0, got none of rank 1;"):
        saves.first.commit(saves.record)
    assert list_checkpoints(saves.storage) == []


def test_the_report_of_a_killed_save_is_not_taken_for_ours(tmp_path: Path) -> None:
    killed = TwoSaves(tmp_path, token="theirs")
    killed.write(killed.second, 6, 12)
    saves = TwoSaves(tmp_path, engine__step_timeout_s=0.1)
    saves.write(saves.first, 0, 6)
    with pytest.raises(ArtifactError, match="got none of rank 1;"):
        saves.first.commit(saves.record)


def test_a_rank_whose_write_failed_ends_the_save_with_its_reason(tmp_path: Path) -> None:
    saves = TwoSaves(tmp_path)
    saves.write(saves.first, 0, 6)
    (tmp_path / f"{checkpoint_name(8)}.partial" / "rank_00001.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="rank_00001"):
        saves.write(saves.second, 6, 12)
    with pytest.raises(ArtifactError, match=r": rank 1 failed: .*rank_00001"):
        saves.first.commit(saves.record)
    assert list_checkpoints(saves.storage) == []


@pytest.mark.parametrize("interval", [(7, 12), (5, 12), (6, 11)], ids=["hole", "overlap", "end"])
def test_files_that_do_not_hold_each_element_once_are_not_committed(tmp_path: Path, interval: tuple[int, int]) -> None:
    saves = TwoSaves(tmp_path)
    saves.write(saves.first, 0, 6)
    saves.write(saves.second, *interval)
    with pytest.raises(ArtifactError, match=r"save .*/step_00000008: every element of a \[3, 4\] must be in one rank"):
        saves.first.commit(saves.record)
    assert list_checkpoints(saves.storage) == []


def test_a_commit_removes_the_checkpoints_that_the_spec_does_not_keep(tmp_path: Path) -> None:
    kept = {"checkpoint__keep_latest": 3, "checkpoint__keep_every_n_steps": 8, "checkpoint__every_n_steps": 4}
    for step in (4, 8, 12, 16, 20):
        state = STATE.model_copy(update={"step": step})
        save = _Write(
            config_of(tmp_path, **kept),
            storage=LocalStorage(tmp_path),
            ranks=ranks_of(0, 1),
            token="ours",
            state=state,
        )
        layout = FragmentLayout(kinds=("weights",), fragments={"a": (0, 12)})
        save.write_file(layout, [np.zeros(12, dtype=np.float32)])
        save.commit(record_of(step).model_copy(update={"files": ()}))
    assert list_checkpoints(LocalStorage(tmp_path)) == [8, 12, 16, 20]


def writer_of(config: TrainConfig) -> CheckpointWriter:
    sets = [SetRecord(num_samples=10, num_shards=1, sha256="a" * 64)]
    return CheckpointWriter(config, ranks=ranks_of(0, 1), fingerprint=fingerprint_of(), training_sets=sets)


def save(config: TrainConfig, engine: Any, *, step: int = 8) -> CheckpointRecord:
    writer = writer_of(config)
    writer.save(engine, STATE.model_copy(update={"step": step}))
    writer.close()
    return read_record(LocalStorage(Path(config.run_dir)), step)


@pytest.mark.parametrize("background", [True, False])
def test_a_record_says_where_the_run_is_and_what_it_is(tmp_path: Path, background: bool) -> None:
    config = config_of(tmp_path, checkpoint__background=background)
    record = save(config, engine_of(num_steps=5))
    assert record.state == STATE
    assert (record.optimizer_steps, record.world_size, record.zero_stage) == (5, 1, 2)
    assert record.kinds == ("weights", "exp_avg", "exp_avg_sq")
    assert record.shapes == {
        "base.weight": (7, 5),
        "base.bias": (7,),
        "input_encoder.weight": (1, 3),
        "input_encoder.bias": (1,),
    }
    assert record.fingerprint == fingerprint_of()
    assert record.training_sets == (SetRecord(num_samples=10, num_shards=1, sha256="a" * 64),)
    assert TrainConfig.model_validate(record.spec) == config
    assert record.packages.keys() == {"torch", "deepspeed", "tensorar"}
    assert torch.__version__.startswith(record.packages["torch"])
    restored = engine_of(seed=1)
    resume_engine(restored, config=config, record=record)
    assert equal(states_of(restored), states_of(engine_of(num_steps=5)))


def test_training_that_goes_on_does_not_change_what_is_being_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    writer, engine = writer_of(config), engine_of(num_steps=2)
    writer.prepare(engine)
    expected = states_of(engine)
    for step in (8, 16):
        writer.save(engine, STATE.model_copy(update={"step": step}))
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.add_(1.0)
        if step == 8:
            writer.close()
            restored = engine_of(seed=1)
            resume_engine(restored, config=config, record=read_record(LocalStorage(tmp_path), 8))
            assert equal(states_of(restored), expected)
            expected = states_of(engine)
    writer.close()
    restored = engine_of(seed=1)
    resume_engine(restored, config=config, record=read_record(LocalStorage(tmp_path), 16))
    assert equal(states_of(restored), expected)


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_told_once_and_the_next_one_is_whole(tmp_path: Path, background: bool) -> None:
    config = config_of(tmp_path, checkpoint__background=background)
    writer, engine = writer_of(config), engine_of(num_steps=1)
    in_the_way = tmp_path / f"{checkpoint_name(8)}.partial" / "rank_00000.safetensors"
    (in_the_way / "directory").mkdir(parents=True)
    if background:
        writer.save(engine, STATE)
        with pytest.raises(OSError, match="rank_00000"):
            writer.save(engine, STATE.model_copy(update={"step": 12}))
    else:
        with pytest.raises(OSError, match="rank_00000"):
            writer.save(engine, STATE)
    assert list_checkpoints(LocalStorage(tmp_path)) == []
    writer.save(engine, STATE.model_copy(update={"step": 16}))
    writer.close()
    assert list_checkpoints(LocalStorage(tmp_path)) == [16]


def test_a_failure_of_the_last_save_is_raised_when_the_writer_closes(tmp_path: Path) -> None:
    writer = writer_of(config_of(tmp_path))
    (tmp_path / f"{checkpoint_name(8)}.partial" / "rank_00000.safetensors" / "directory").mkdir(parents=True)
    writer.save(engine_of(num_steps=1), STATE)
    with pytest.raises(OSError, match="rank_00000"):
        writer.close()


@pytest.mark.parametrize("change", ["wider", "another"])
def test_the_checkpoint_of_another_model_is_refused_naming_a_parameter(tmp_path: Path, change: str) -> None:
    config = config_of(tmp_path)
    record = save(config, engine_of())
    engine = engine_of()
    if change == "wider":
        engine.module.base = torch.nn.Linear(5, 8)
        said = r"got 2 that differ \(base\.weight: there \(7, 5\), in the model \(8, 5\)\)"
    else:
        engine.module.output_decoder = torch.nn.Linear(1, 1)
        said = r"got 2 that differ \(output_decoder\.weight: there None, in the model \(1, 1\)\)"
    with pytest.raises(ArtifactError, match=rf"resume .*/step_00000008: parameters must have .*{said}; set the model"):
        resume_engine(engine, config=config, record=record)
    fewer = engine_of()
    del fewer.module.input_encoder
    with pytest.raises(ArtifactError, match=r"input_encoder\.weight: there \(1, 3\), in the model None"):
        resume_engine(fewer, config=config, record=record)


def test_a_rank_resumes_from_all_files_of_which_it_needs_a_part(tmp_path: Path) -> None:
    storage, config = LocalStorage(tmp_path), config_of(tmp_path)
    saves = [_Write(config, storage=storage, ranks=ranks_of(rank, 2), token="ours", state=STATE) for rank in (0, 1)]
    for rank, save_of_rank in enumerate(saves):
        fragments = Fragments(engine_of(rank=rank, world_size=2, num_steps=3))
        save_of_rank.write_file(fragments.layout, [view.numpy() for view in fragments.views()])
    shapes = parameter_shapes(engine_of())
    kinds = fragments.layout.kinds
    saves[0].commit(
        record_of(8).model_copy(update={"files": (), "shapes": shapes, "kinds": kinds, "optimizer_steps": 3})
    )
    whole = torch.cat([parameter.detach().flatten() for parameter in engine_of(num_steps=3).module.parameters()])
    for rank in (0, 1):
        engine, own = partition_of(rank=rank, world_size=2)
        resume_engine(engine, config=config, record=read_record(storage, 8))
        assert torch.equal(engine.optimizer.single_partition_of_fp32_groups[0].detach(), whole[own])


def test_a_state_without_a_step_restores_as_one(tmp_path: Path) -> None:
    fragments = Fragments(engine_of())
    assert (fragments.layout.kinds, fragments.optimizer_steps) == (("weights",), 0)
    config = config_of(tmp_path)
    save(config, engine_of(), step=0)
    restored = engine_of(seed=1)
    resume_engine(restored, config=config, record=read_record(LocalStorage(tmp_path), 0))
    assert equal(states_of(restored), states_of(engine_of()))


def test_a_rank_opens_the_files_around_its_own_and_not_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, config, num_writers = LocalStorage(tmp_path), config_of(tmp_path), 20
    saves = [
        _Write(config, storage=storage, ranks=ranks_of(rank, num_writers), token="ours", state=STATE)
        for rank in range(num_writers)
    ]
    for rank, save_of_rank in enumerate(saves):  # 3 of 46 elements each
        engine, own = partition_of(rank=rank, world_size=num_writers)
        torch.nn.init.constant_(engine.optimizer.single_partition_of_fp32_groups[0], rank)
        fragments = Fragments(engine)
        save_of_rank.write_file(fragments.layout, [view.detach().numpy() for view in fragments.views()])
    shapes, kinds = parameter_shapes(engine), fragments.layout.kinds
    saves[0].commit(record_of(8).model_copy(update={"files": (), "shapes": shapes, "kinds": kinds}))
    record = read_record(storage, 8)
    opened: list[str] = []
    os_open = os.open

    def watched_open(path: str, *arguments: Any) -> int:
        opened.append(Path(path).name)
        return os_open(path, *arguments)

    monkeypatch.setattr(os, "open", watched_open)
    # Of 5 elements each: rank 5 has 25 to 29, of files 8 and 9, and looks from file 10 on to both sides.
    for rank, files in ((0, [0, 1]), (5, [10, 11, 9, 12, 8]), (9, [18, 19, 17, 16, 15])):
        engine, own = partition_of(rank=rank, world_size=10)
        opened.clear()
        resume_engine(engine, config=config, record=record)
        assert list(dict.fromkeys(opened)) == [f"rank_{file:05d}.safetensors" for file in files]
        (master,) = engine.optimizer.single_partition_of_fp32_groups
        expected = [float(index // 3) for index in range(*own.indices(46))]
        assert master.detach().tolist()[: len(expected)] == expected


@pytest.mark.parametrize("num_ranks", [2, 16])
def test_what_rank_0_syncs_to_disk_for_a_commit_does_not_grow_with_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    storage, config = LocalStorage(tmp_path), config_of(tmp_path)
    saves = [
        _Write(config, storage=storage, ranks=ranks_of(rank, num_ranks), token="ours", state=STATE)
        for rank in range(num_ranks)
    ]
    for rank, save_of_rank in enumerate(saves):
        layout = FragmentLayout(kinds=("weights",), fragments={"a": (rank, rank + 1)})
        save_of_rank.write_file(layout, [np.zeros(1, dtype=np.float32)])
    calls = record_disk_calls(monkeypatch, root=tmp_path)
    saves[0].commit(record_of(8).model_copy(update={"files": (), "shapes": {"a": (num_ranks,)}}))
    partial = f"{checkpoint_name(8)}.partial"
    assert [call for call in calls if call.startswith("fsync")] == [
        f"fsync {partial}",  # the ranks' reports are gone
        f"fsync {partial}/*",
        f"fsync {partial}",  # the record is there
        "fsync checkpoints",
    ]
