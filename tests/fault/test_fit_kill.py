"""A tokenizer fit that is killed and run again ends in the bytes of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenization.config import FitTokenizerConfig, VQConfig

RUN = """
import sys
from tokenization.config import FitTokenizerConfig
from tokenization.fit import fit_tokenizer
fit_tokenizer(FitTokenizerConfig.model_validate_json(sys.argv[1]))
"""


def config_in(root: Path, run: str) -> FitTokenizerConfig:
    return FitTokenizerConfig(
        kind="fit_tokenizer",
        run_dir=str(root / run),
        images=str(root / "images"),
        validation_images=str(root / "images"),
        image_size_px=16,
        network=VQConfig(codebook_size=8, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32),
        num_steps=60,
        autoencoder_steps=5,
        batch_size=4,
        checkpoint_every_n_steps=10,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the fit ended before it could be killed"
        assert time.monotonic() < deadline_s, f"{path} never appeared"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("step", [10, 30])
def test_a_killed_fit_ends_in_the_same_bytes(tmp_path: Path, step: int) -> None:
    (tmp_path / "images").mkdir()
    for image_index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{image_index}.png")
    config = config_in(tmp_path, "killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", RUN, config.model_dump_json()], env=environment) as process:
        wait_for(Path(config.run_dir) / "checkpoints" / f"step_{step:08d}", process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = subprocess.run([sys.executable, "-c", RUN, config.model_dump_json()], env=environment, check=True)
    assert resumed.returncode == 0
    subprocess.run(
        [sys.executable, "-c", RUN, config_in(tmp_path, "whole").model_dump_json()], env=environment, check=True
    )
    killed, whole = (Path(tmp_path / run / "tokenizer.safetensors").read_bytes() for run in ("killed", "whole"))
    assert killed == whole
    assert not list((tmp_path / "killed").rglob(".staged-*"))
