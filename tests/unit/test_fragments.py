"""The states of an engine, to files and back: from any number of ranks to any other, bit for bit."""

from pathlib import Path

import pytest
import torch
from stand_in_engine import Model, engine_of, equal, partition_of, states_of

from pipeline.local_storage import LocalStorage
from pipeline.storage import ArtifactError
from training.fragment_file import FragmentFile, write_fragments
from training.fragments import Fragments, parameter_shapes, restore_fragments


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
