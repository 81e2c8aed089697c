"""The demo on a corpus of 64 pictures: killed while it trains it goes on, and a finished one has nothing to do."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

PICTURES = sorted((Path(__file__).parents[1] / "data" / "held_out_emoji").glob("*.png"))
CLASS_NAMES = [f"class-{index:02d}" for index in range(98)]
CHANGES = (
    "base.num_steps=6",
    "base.checkpoint.every_n_steps=2",
    "base.validation.every_n_steps=3",
    "base.optimizer.warmup_steps=0",
    "base.log_every_n_steps=1",
    "tensorar.num_steps=2",
    "tensorar.optimizer.warmup_steps=0",
    "sample_base.num_per_label=1",
    "sample_tensorar.num_per_label=1",
    "sample_tensorar.num_strip_images=2",
)

pytestmark = pytest.mark.slow


def write_corpus(root: Path) -> None:
    """A corpus as the demo leaves it, so that nothing is fetched."""
    for split in ("train", "validation"):
        tars = root / "tars" / split
        tars.mkdir(parents=True)
        with tarfile.open(tars / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index, path in enumerate(PICTURES):
                name = CLASS_NAMES[index]
                folder = root / "folders" / split / name
                folder.mkdir(parents=True)
                (folder / path.name).write_bytes(path.read_bytes())
                fields = {"caption": path.stem, "label": index, "class": name}
                for extension, data in ((".png", path.read_bytes()), (".json", json.dumps(fields).encode())):
                    member = tarfile.TarInfo(path.stem + extension)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    (root / "corpus.json").write_text(json.dumps({"version": 1}))


def start_demo(directory: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "demo",
        "--dir",
        str(directory / "runs"),
        "--data",
        str(directory / "data"),
    ]
    for change in CHANGES:
        command += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not list(run_dir.glob("checkpoints/step_????????")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_demo_that_was_killed_while_training_goes_on_to_the_report(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data" / "open-emoji")
    runs = tmp_path / "runs"
    process = start_demo(tmp_path)
    wait_for_checkpoint(runs / "base", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (runs / "report.html").exists()
    tokenized = (runs / "codes" / "shards" / "00000.tar").stat().st_mtime_ns

    output = finish(start_demo(tmp_path))
    assert f"report: {runs / 'report.html'}" in output
    assert (runs / "codes" / "shards" / "00000.tar").stat().st_mtime_ns == tokenized
    steps = [json.loads(line)["step"] for line in (runs / "base" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    assert "<svg" in (runs / "report.html").read_text()

    pictures = (runs / "samples-tensorar" / "grid.png").stat().st_mtime_ns
    begin_s = time.monotonic()
    output = finish(start_demo(tmp_path))
    assert "goes on" not in output
    assert time.monotonic() - begin_s < 90
    assert (runs / "samples-tensorar" / "grid.png").stat().st_mtime_ns == pictures
