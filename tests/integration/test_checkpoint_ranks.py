"""Checkpoints of real engines on gloo ranks: every ZeRO stage resumes bit for bit, and any world size reads any."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from synthetic_shards import fingerprint_of

from jobs.cli import main
from pipeline.storage import ArtifactError, open_storage
from training.checkpoint import CheckpointRecord, checkpoint_name, list_checkpoints, read_record
from training.config import TrainConfig
from training.ranks import Ranks
from training.resume import find_checkpoint
from training.weights import load_model

SCRIPT = Path(__file__).parents[1] / "checkpoint_ranks.py"


class Mode(NamedTuple):
    """How an engine holds its state."""

    zero_stage: int
    dtype: str
    offload: bool = False
    module_warmup_steps: int = 0
    """Over the third step, where the halves meet, or up to one before it."""


FAST = [Mode(2, "bfloat16"), Mode(3, "float32"), Mode(2, "bfloat16", module_warmup_steps=4)]
ALL = [
    *(Mode(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")),
    *(Mode(stage, "bfloat16", offload=True) for stage in (1, 2, 3)),
    *(Mode(stage, "float32", module_warmup_steps=steps) for stage in (0, 2, 3) for steps in (2, 4)),
]
State = dict[str, npt.NDArray[np.float32]]


def spec_of(run_dir: Path, *, zero_stage: int, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """Sizes that no world size divides, so that partitions are padded and parameters cut in the middle."""
    model = {"num_layers": 1, "num_heads": 3, "model_dim": 36, "codebook_size": 17, "codes_per_side": 3}
    spec = {
        "kind": "train",
        "run_dir": str(run_dir),
        "data": {"shards": "unused"},
        "model": model | {"num_classes": 5, "dropout": 0.1},
        "optimizer": {"learning_rate": 3e-3, "ema_decay": 0.9},
        "engine": {"zero_stage": zero_stage, "dtype": dtype, "global_batch_size": 8},
        "num_steps": 99,
        "warm_start": "unused",
        "seed": 4,
    }
    for name, value in changes.items():
        section, field = name.split("__")
        spec[section] = {**spec.get(section, {}), field: value}
    return TrainConfig.model_validate(spec).model_dump(mode="json")


def run(cases: list[dict[str, Any]], *, num_ranks: int, directory: Path) -> list[Any]:
    """The losses of each case by step, or the error of every rank."""
    asked, answered = directory / "cases.json", directory / "results.json"
    asked.write_text(json.dumps(cases))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"),
            *(str(SCRIPT), str(asked), str(answered)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(answered.read_text())
    return [
        {int(step): loss for step, loss in result.items()} if isinstance(result, dict) else result for result in results
    ]


def state_of(run_dir: Path, step: int) -> State:
    """Every state of every parameter, put together from the files by what their own metadata says."""
    storage = open_storage(str(run_dir))
    record = read_record(storage, step)
    shapes = record.shapes
    whole = {
        f"{kind}/{name}": np.full(np.prod(shape), np.nan, np.float32)
        for kind in record.kinds
        for name, shape in shapes.items()
    }
    for file in record.files:
        path = run_dir / checkpoint_name(step) / file.name
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fragments = json.loads(header["__metadata__"]["tensorar"])["fragments"]
        for key, values in load_file(path).items():
            start, end = fragments[key.partition("/")[2]]
            assert np.isnan(whole[key][start:end]).all(), "an element is in two files"
            whole[key][start:end] = values
    assert not any(np.isnan(values).any() for values in whole.values())
    return whole


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def spec_of_mode(directory: Path, name: str, mode: Mode) -> dict[str, Any]:
    warmed_up = {"optimizer__module_warmup_steps": mode.module_warmup_steps, "model__window_size": 3}
    return spec_of(
        directory / "-".join(map(str, (name, *mode))),
        zero_stage=mode.zero_stage,
        dtype=mode.dtype,
        engine__offload_optimizer=mode.offload,
        checkpoint__background=mode.zero_stage != 1,
        **(warmed_up if mode.module_warmup_steps else {}),
    )


def halved_cases(modes: list[Mode], directory: Path) -> list[dict[str, Any]]:
    """Of each mode: six steps at once, three, and the other three."""
    return [
        {"spec": spec_of_mode(directory, name, mode), **steps}
        for mode in modes
        for name, steps in (
            ("whole", {"until": 6, "saves": [6]}),
            ("halves", {"until": 3, "saves": [2, 3]}),
            ("halves", {"until": 6, "saves": [6]}),
        )
    ]


def check_bit_for_bit(modes: list[Mode], directory: Path, results: list[Any]) -> None:
    for index, mode in enumerate(modes):
        whole, first, second = results[3 * index : 3 * index + 3]
        assert first | second == whole, mode
        states = [state_of(directory / "-".join(map(str, (name, *mode))), 6) for name in ("whole", "halves")]
        assert {key.partition("/")[0] for key in states[0]} == {"weights", "exp_avg", "exp_avg_sq", "ema"}
        assert equal(*states), mode


@pytest.fixture(scope="module")
def fast_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Their directory, and what two ranks answered for two modes and for a save where rank 1 cannot write."""
    directory = tmp_path_factory.mktemp("fast")
    in_the_way = directory / "failing" / "checkpoints" / "step_00000002.partial" / "rank_00001.safetensors"
    (in_the_way / "directory").mkdir(parents=True)
    failing = {"spec": spec_of(directory / "none", zero_stage=2), "until": 3, "saves": [1, 2, 3], "fails": True}
    cases = [*halved_cases(FAST, directory), failing | {"into": str(directory / "failing")}]
    return directory, run(cases, num_ranks=2, directory=directory)


@pytest.fixture
def real_run(fast_runs: tuple[Path, list[Any]]) -> Path:
    """Two checkpoints, of steps 3 and 6, of two ranks under ZeRO 2."""
    return fast_runs[0] / "halves-2-bfloat16-False-0"


def test_a_resumed_engine_goes_on_bit_for_bit(fast_runs: tuple[Path, list[Any]]) -> None:
    check_bit_for_bit(FAST, *fast_runs)


@pytest.mark.slow
def test_every_stage_and_dtype_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_bit_for_bit(ALL, tmp_path, run(halved_cases(ALL, tmp_path), num_ranks=2, directory=tmp_path))


def test_a_rank_that_cannot_write_fails_the_run_on_every_rank(fast_runs: tuple[Path, list[Any]]) -> None:
    directory, results = fast_runs
    first, second = results[-1]
    assert "step_00000002.partial/rank_00001" in first
    assert "failed: [Errno" in first
    assert "rank_00001.safetensors" in second
    assert list_checkpoints(open_storage(str(directory / "failing"))) == [1]


def found(run_dir: Path) -> CheckpointRecord | None:
    config = TrainConfig.model_validate(spec_of(run_dir, zero_stage=2))
    one_rank = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    return find_checkpoint(config, ranks=one_rank, fingerprint=fingerprint_of())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "record.json"])
def test_a_damaged_file_of_the_newest_falls_back_and_is_named(
    real_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str
) -> None:
    shutil.copytree(real_run, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step_00000006" / name)
    record = found(tmp_path / "run")
    assert record is not None
    assert record.step == 3
    assert "step_00000006" in caplog.text
    assert name in caplog.text
    command = CliRunner().invoke(main, ["verify", str(tmp_path / "run")])
    assert command.exit_code == 1
    assert name in command.stderr
    assert "2 checkpoints of a training run; whole are those of step 3; 1 problems" in command.stderr


def test_with_all_damaged_nothing_starts_from_zero(real_run: Path, tmp_path: Path) -> None:
    shutil.copytree(real_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step_*/rank_00001.safetensors"):
        truncate(path)
    with pytest.raises(ArtifactError, match=r"got 2 damaged ones .*step_00000003/rank_00001\.safetensors has"):
        found(tmp_path / "run")


def test_codes_of_another_tokenizer_do_not_go_on(real_run: Path) -> None:
    config = TrainConfig.model_validate(spec_of(real_run, zero_stage=2))
    other = fingerprint_of().model_copy(update={"weights_sha256": "11" * 32})
    with pytest.raises(ArtifactError, match="codes must come from tokenizer"):
        find_checkpoint(config, ranks=Ranks(rank=0, world_size=1, device=torch.device("cpu")), fingerprint=other)


def test_a_run_on_s3_resumes_verifies_loads_and_exports(s3_url: str, tmp_path: Path) -> None:
    local, remote = tmp_path / "run", f"{s3_url}/run"
    specs = [spec_of(local, zero_stage=2), spec_of(local, zero_stage=2) | {"run_dir": remote}]
    cases = [
        {"spec": specs[0], "until": 4, "saves": [4]},
        {"spec": specs[1], "until": 2, "saves": [1, 2]},
        {"spec": specs[1], "until": 4, "saves": [4]},
    ]
    whole, first, second = run(cases, num_ranks=2, directory=tmp_path)
    assert first | second == whole
    storage = open_storage(remote)
    assert list_checkpoints(storage) == [2, 4]  # the newest two
    assert {name.rpartition("/")[2] for name in storage.list("checkpoints/step_00000004/")} == {
        *("rank_00000.safetensors", "rank_00001.safetensors", "record.json")
    }
    assert "2 checkpoints of a training run" in CliRunner().invoke(main, ["verify", remote]).stdout
    weights = load_model(local)[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in load_model(remote)[0].state_dict().items())
    output = str(tmp_path / "out.safetensors")
    command = CliRunner().invoke(main, ["export", remote, "--to", "safetensors", "--ema", "--output", output])
    assert command.exit_code == 0, command.output
    averages = load_model(local, use_ema=True)[0].state_dict()
    assert all(torch.equal(value, averages[name]) for name, value in load_model(output)[0].state_dict().items())


@pytest.mark.slow
def test_another_world_size_and_stage_reads_every_bit(tmp_path: Path) -> None:
    """Each way resumes and saves at once: what it wrote must be what it read."""
    origin = tmp_path / "origin"
    (uninterrupted,) = run(
        [{"spec": spec_of(origin, zero_stage=2, model__dropout=0.0), "until": 5, "saves": [3]}],
        num_ranks=2,
        directory=tmp_path,
    )
    chain = [(1, 3), (1, 0), (1, 1), (2, 3), (2, 0), (2, 2)]
    places = [origin, *(tmp_path / f"{index}" for index in range(len(chain)))]
    for num_ranks in (1, 2):
        cases = [
            {
                "spec": spec_of(source, zero_stage=stage, model__dropout=0.0),
                "until": 3,
                "saves": [3],
                "into": str(target),
            }
            for (ranks, stage), (source, target) in zip(chain, pairwise(places), strict=True)
            if ranks == num_ranks
        ]
        # After the save the same engines go on, so that the weights they compute with are checked too.
        for case in cases:
            case["until"] = 5
        for losses in run(cases, num_ranks=num_ranks, directory=tmp_path):
            assert losses[4] == pytest.approx(uninterrupted[4], abs=1e-5)
            assert losses[5] == pytest.approx(uninterrupted[5], abs=1e-5)
    states = [state_of(place, 3) for place in places]
    assert all(equal(states[0], state) for state in states[1:])
