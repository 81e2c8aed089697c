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

WAIT_S = 450

pytestmark = [pytest.mark.slow, pytest.mark.soak]


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


class Demo:
    """One run of the command; its output goes to a file, so that nobody has to read it for it to go on."""

    def __init__(self, directory: Path, name: str) -> None:
        self._log = directory / f"{name}.log"
        runs, data = str(directory / "runs"), str(directory / "data")
        command = [sys.executable, "-m", "jobs.cli", "demo", "--dir", runs, "--data", data]
        for change in CHANGES:
            command += ["--set", change]
        with self._log.open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def finish(self) -> str:
        try:
            assert self._process.wait(timeout=WAIT_S) == 0, self.output()
        finally:
            self.kill()
        return self.output()

    def kill_at_checkpoint(self, run_dir: Path) -> None:
        deadline = time.monotonic() + WAIT_S
        try:
            while not list(run_dir.glob("checkpoints/step_????????")):
                assert self._process.poll() is None, self.output()
                assert time.monotonic() < deadline, self.output()
                time.sleep(0.1)
        finally:
            self.kill()


@pytest.mark.timeout(1500)
def test_a_demo_that_was_killed_while_training_goes_on_to_the_report(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data" / "open-emoji")
    runs = tmp_path / "runs"
    Demo(tmp_path, "first").kill_at_checkpoint(runs / "base")
    assert not (runs / "report.html").exists()
    tokenized = (runs / "codes" / "shards" / "00000.tar").stat().st_mtime_ns

    output = Demo(tmp_path, "second").finish()
    assert f"report: {runs / 'report.html'}" in output
    assert (runs / "codes" / "shards" / "00000.tar").stat().st_mtime_ns == tokenized
    steps = [json.loads(line)["step"] for line in (runs / "base" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    assert "<svg" in (runs / "report.html").read_text()

    pictures = (runs / "samples-tensorar" / "grid.png").stat().st_mtime_ns
    metrics = (runs / "tensorar" / "metrics.jsonl").read_bytes()
    Demo(tmp_path, "third").finish()
    assert (runs / "samples-tensorar" / "grid.png").stat().st_mtime_ns == pictures
    assert (runs / "tensorar" / "metrics.jsonl").read_bytes() == metrics
