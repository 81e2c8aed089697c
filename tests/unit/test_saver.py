"""A save as each rank does it: whole or not there at all; and the states of an engine, to files and back."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
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
from training.fragment_file import FragmentFile, FragmentLayout, write_fragments
from training.fragments import Fragments, parameter_shapes, restore_fragments
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


class Model(torch.nn.Module):
    """Sizes that no number of ranks divides, one smaller than some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(5, 7)
        self.input_encoder = torch.nn.Linear(3, 1)


def engine_of(*, rank: int = 0, world_size: int = 1, seed: int = 0, num_steps: int = 0) -> Any:
    """What fragments read of an engine without ZeRO, where every rank holds all parameters in float32."""
    torch.manual_seed(seed)
    module = Model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(num_steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, global_rank=rank, world_size=world_size
    )


def states_of(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights and of all that the optimiser keeps."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = parameter.detach().clone()
        for kind, value in engine.basic_optimizer.state.get(parameter, {}).items():
            found[f"{kind} of {name}"] = value.clone()
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_of(directory: Path, *, world_size: int) -> list[FragmentFile]:
    """What `world_size` ranks write of one state, three steps on."""
    directory.mkdir()
    for rank in range(world_size):
        fragments = Fragments(engine_of(rank=rank, world_size=world_size, num_steps=3))
        assert fragments.optimizer_steps == 3
        buffer = torch.full((len(fragments.layout.kinds) * fragments.layout.num_elements,), float("nan"))
        fragments.copy_to(buffer)
        assert buffer.tolist() == [number for view in fragments.views() for number in view.tolist()]
        write_fragments(directory / f"{rank}", fragments.layout, [buffer.numpy()])
    return [FragmentFile(LocalStorage(directory), f"{rank}") for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_files_of_any_number_of_ranks_give_back_every_bit(tmp_path: Path, world_size: int) -> None:
    files = files_of(tmp_path / "files", world_size=world_size)
    assert all(file.layout.kinds == ("weights", "exp_avg", "exp_avg_sq") for file in files if file.layout.fragments)
    held = [
        (name, index)
        for file in files
        for name, (start, end) in file.layout.fragments.items()
        for index in range(start, end)
    ]
    assert sorted(held) == sorted(
        (name, index) for name, parameter in Model().named_parameters() for index in range(parameter.numel())
    )
    assert all(start < end for file in files for start, end in file.layout.fragments.values())
    for order in (files, files[::-1]):
        restored = engine_of(seed=1)
        restore_fragments(restored, order, optimizer_steps=3)
        assert equal(states_of(restored), states_of(engine_of(num_steps=3)))


def partition_of(*, rank: int, world_size: int) -> tuple[Any, slice]:
    """What fragments read of an engine under ZeRO 1 or 2, and which of all elements end to end its rank holds."""
    module = Model()
    sizes = [parameter.numel() for parameter in module.parameters()]
    length = -(-sum(sizes) // world_size)  # the last one is padded
    own = slice(rank * length, (rank + 1) * length)
    first = 0
    for parameter, size in zip(module.parameters(), sizes, strict=True):
        start, end = max(first, own.start), min(first + size, own.stop)
        of_weights = SimpleNamespace(start=start - first)
        of_master = SimpleNamespace(start=start - own.start, numel=end - start)
        mapping = SimpleNamespace(lp_fragment_address=of_weights, hp_fragment_address=of_master)
        parameter._hp_mapping = mapping if start < end else None  # type: ignore[attr-defined]
        first += size
    master = torch.nn.Parameter(torch.zeros(length))
    optimizer = SimpleNamespace(
        bit16_groups=[list(module.parameters())],
        single_partition_of_fp32_groups=[master],
        num_refreshed=0,
    )

    def update_lp_params() -> None:
        optimizer.num_refreshed += 1

    optimizer.update_lp_params = update_lp_params
    basic_optimizer = torch.optim.AdamW([master])
    engine = SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=basic_optimizer, global_rank=rank, world_size=world_size
    )
    return engine, own


@pytest.mark.parametrize(("num_writers", "num_readers"), [(1, 2), (2, 2), (2, 3), (3, 2), (5, 3), (3, 5)])
def test_partitions_of_any_number_of_ranks_take_and_give_what_is_theirs(
    tmp_path: Path, num_writers: int, num_readers: int
) -> None:
    files = files_of(tmp_path / "files", world_size=num_writers)
    whole = engine_of(num_steps=3)
    states = [whole.basic_optimizer.state[parameter] for parameter in whole.module.parameters()]
    expected = {
        "weights": torch.cat([parameter.detach().flatten() for parameter in whole.module.parameters()]),
        **{kind: torch.cat([state[kind].flatten() for state in states]) for kind in ("exp_avg", "exp_avg_sq")},
    }
    (tmp_path / "again").mkdir()
    again = []
    for rank in range(num_readers):
        engine, own = partition_of(rank=rank, world_size=num_readers)
        restore_fragments(engine, files, optimizer_steps=3)
        (master,) = engine.optimizer.single_partition_of_fp32_groups
        state = engine.basic_optimizer.state[master]
        held = {"weights": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for kind, values in held.items():
            wanted = expected[kind][own]
            assert torch.equal(values[: len(wanted)], wanted), kind
            assert not values[len(wanted) :].any(), kind
        assert float(state["step"]) == 3.0
        assert engine.optimizer.num_refreshed == 1  # the weights that are computed with
        fragments = Fragments(engine)
        arrays = [view.numpy() for view in fragments.views()]
        write_fragments(tmp_path / "again" / f"{rank}", fragments.layout, arrays)
        again.append(FragmentFile(LocalStorage(tmp_path / "again"), f"{rank}"))
    restored = engine_of(seed=1)
    restore_fragments(restored, again, optimizer_steps=3)
    assert equal(states_of(restored), states_of(whole))


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


def test_what_is_not_trained_is_in_no_file() -> None:
    engine = engine_of()
    engine.module.base.bias.requires_grad_(False)
    trained = {"base.weight", "input_encoder.weight", "input_encoder.bias"}
    assert Fragments(engine).layout.fragments.keys() == parameter_shapes(engine).keys() == trained


def test_elements_that_no_file_holds_are_counted(tmp_path: Path) -> None:
    files = files_of(tmp_path / "files", world_size=2)
    with pytest.raises(ArtifactError, match=r"every element of the model, got none of 25 of them; verify the run"):
        restore_fragments(engine_of(seed=1), files[:1], optimizer_steps=3)  # 17 + 3 + 1 of 46 in it


def test_no_file_is_opened_after_the_last_missing_element(tmp_path: Path) -> None:
    (file,) = files_of(tmp_path / "files", world_size=1)
    files = iter([file, file])
    restore_fragments(engine_of(seed=1), files, optimizer_steps=3)
    assert list(files) == [file]


@pytest.mark.parametrize(("warmup_steps", "of_base"), [(0, 3.0), (2, 1.0), (3, 0.0), (9, 0.0)])
def test_the_base_model_does_not_count_the_steps_that_left_it_alone(
    tmp_path: Path, warmup_steps: int, of_base: float
) -> None:
    engine = engine_of(seed=1)
    files = files_of(tmp_path / "files", world_size=1)
    restore_fragments(engine, files, optimizer_steps=3, module_warmup_steps=warmup_steps)
    states = states_of(engine)
    assert float(states["step of base.weight"]) == float(states["step of base.bias"]) == of_base
    assert float(states["step of input_encoder.weight"]) == 3.0
    assert Fragments(engine).optimizer_steps == 3


def test_a_state_without_a_step_restores_as_one(tmp_path: Path) -> None:
    fragments = Fragments(engine_of())
    assert (fragments.layout.kinds, fragments.optimizer_steps) == (("weights",), 0)
    config = config_of(tmp_path)
    save(config, engine_of(), step=0)
    restored = engine_of(seed=1)
    resume_engine(restored, config=config, record=read_record(LocalStorage(tmp_path), 0))
    assert equal(states_of(restored), states_of(engine_of()))


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
