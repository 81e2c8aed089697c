"""A run whose run_dir is on S3, moved to another machine (another TMPDIR): metrics and logs read as one run's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_shards import train_config, write_shard_set

from pipeline.storage import open_storage
from training.checkpoint import list_checkpoints
from training.config import TrainConfig
from training.json_lines import parse_json_lines

RANK = """
import logging, os, sys
from training.config import TrainConfig
from training.loop import train

result = train(TrainConfig.model_validate_json(sys.argv[1]))
print(result.step, result.is_finished, result.checkpoint)
sys.stdout.flush()
os._exit(0)
"""


def run_alone(config: TrainConfig, tmp_dir: Path) -> str:
    """Run the only rank of a run on the machine whose TMPDIR is `tmp_dir` and return what it printed."""
    tmp_dir.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | variables | {"MASTER_PORT": str(port), "TMPDIR": str(tmp_dir), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, config.model_dump_json()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_run_on_s3_goes_on_elsewhere_with_all_its_metrics(s3_url: str, tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    changes = {"optimizer__schedule": "constant", "checkpoint__every_n_steps": 3}
    config = train_config(tmp_path, shards=shards, num_steps=4, **changes).model_copy(update={"run_dir": s3_url})
    assert run_alone(config, tmp_path / "a") == f"4 True {s3_url}/checkpoints/step_00000004"
    longer = config.model_copy(update={"num_steps": 6})
    assert run_alone(longer, tmp_path / "b") == f"6 True {s3_url}/checkpoints/step_00000006"
    storage = open_storage(s3_url)
    assert list_checkpoints(storage) == [4, 6]
    lines = parse_json_lines(storage.read_bytes("metrics.jsonl").decode(), where="metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    log = storage.read_bytes("logs/rank_00000.log").decode()
    assert "step=4/4" in log
    assert "step=6/6" in log
    assert len(storage.list("tensorboard/")) == 2
