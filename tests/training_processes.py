"""Training runs as processes of their own, under torchrun, for tests."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.config import S3Config
from training.config import TrainConfig
from training.run_weights import find_run_checkpoint

SCRIPT = Path(__file__).with_name("run_training.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(config: TrainConfig, *, num_ranks: int = 2, **variables: str) -> subprocess.Popen[str]:
    """Start the ranks of a run; their output is one pipe."""
    spec = Path(f"{config.run_dir}.json") if "://" not in config.run_dir else Path(variables["TMPDIR"]) / "spec.json"
    spec.write_text(config.model_dump_json())
    command = [*TORCHRUN, f"--nproc-per-node={num_ranks}", str(SCRIPT), str(spec)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(config: TrainConfig, *, num_ranks: int = 2, **variables: str) -> tuple[int, str]:
    """Return exit status and output of a run that has ended."""
    process = start(config, num_ranks=num_ranks, **variables)
    output, _ = process.communicate(timeout=280)
    return process.returncode, output


def run_script(name: str, *arguments: str, num_ranks: int = 2) -> None:
    """Run a script of `tests/` on ranks of its own; fails with all that it said."""
    done = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={num_ranks}", str(SCRIPT.with_name(name)), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ranks_of(torchrun: int) -> list[int]:
    """Return the process ids of the ranks of a torchrun process, in rank order."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return [int(child) for child in children]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the float32 weights of a run's newest checkpoint."""
    checkpoint = find_run_checkpoint(str(run_dir), s3=S3Config())
    assert checkpoint is not None
    return checkpoint.read_weights()
