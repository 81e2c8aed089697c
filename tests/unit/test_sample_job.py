"""The `sample` job: every promised artifact, the same pictures on any batch size, and no foreign tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from jobs.run import run_spec
from pipeline.storage import ArtifactError
from tokenization.config import TokenizerConfig, VQConfig
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork
from tokenization.weights_file import write_weights
from training.config import ModelConfig, SampleConfig, SamplerConfig
from training.sample import pick_device, run_sample, tile_images
from training.tensorar import build_model
from training.weights import save_model

NETWORK = VQConfig(codebook_size=24, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32)
SIDE_PX = 6


def _write_tokenizer(path: Path, *, seed: int) -> TokenizerConfig:
    torch.manual_seed(seed)
    write_weights(path, network=NETWORK, state=dict(VQNetwork(NETWORK).state_dict()), metadata={})
    return TokenizerConfig(weights=str(path), image_size_px=SIDE_PX, batch_size=4)


def _write_model(path: Path, tokenizer: TokenizerConfig, *, window_size: int, **changes: Any) -> None:
    torch.manual_seed(5)
    fields = {"num_layers": 1, "num_heads": 2, "model_dim": 16, "codebook_size": 24, "codes_per_side": 3}
    config = ModelConfig(**(fields | {"num_classes": 5, "window_size": window_size} | changes))
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    fingerprint = Tokenizer.load(tokenizer).fingerprint
    save_model(path, model.state_dict(), config=config, fingerprint=fingerprint, step=70)


@pytest.fixture
def spec(tmp_path: Path) -> SampleConfig:
    tokenizer = _write_tokenizer(tmp_path / "tokenizer.safetensors", seed=0)
    _write_model(tmp_path / "model.safetensors", tokenizer, window_size=3)
    return SampleConfig(
        kind="sample",
        run_dir=str(tmp_path / "samples"),
        weights=str(tmp_path / "model.safetensors"),
        tokenizer=tokenizer,
        labels=(4, 0),
        num_per_label=3,
        batch_size=4,
        num_strip_images=2,
        device="cpu",
        seed=9,
    )


def _snapshot(directory: Path) -> dict[str, bytes]:
    """Bytes of every file but the times in samples.json and the lock."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name not in ("samples.json", ".lock")}


def test_every_artifact_is_written_and_they_agree(spec: SampleConfig) -> None:
    seen: list[tuple[int, int]] = []
    run_dir = Path(run_sample(spec, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(4, 6), (6, 6)]
    codes = np.load(run_dir / "codes.npy")
    assert (codes.shape, codes.dtype) == ((6, 9), np.int32)
    images = np.load(run_dir / "samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((6, SIDE_PX, SIDE_PX, 3), np.uint8)
    assert np.array_equal(images, Tokenizer.load(spec.tokenizer).decode(codes))
    assert [path.name for path in sorted((run_dir / "images").iterdir())] == [f"{i:05d}.png" for i in range(6)]
    for index in range(6):
        assert np.array_equal(np.asarray(Image.open(run_dir / "images" / f"{index:05d}.png")), images[index])
    grid = np.asarray(Image.open(run_dir / "grid.png"))
    assert grid.shape == (2 * SIDE_PX + 2, 3 * SIDE_PX + 4, 3)  # a line per label
    assert np.array_equal(grid[SIDE_PX + 2 :, :SIDE_PX], images[3])
    strip = np.asarray(Image.open(run_dir / "strip.png"))
    assert strip.shape == (2 * SIDE_PX + 2, 3 * SIDE_PX + 4, 3)  # a column per refinement
    assert np.array_equal(strip[:SIDE_PX, -SIDE_PX:], images[0])  # the last is the final picture
    assert np.array_equal(strip[-SIDE_PX:, -SIDE_PX:], images[3])
    assert not list(run_dir.glob(".staged-*"))


def test_the_result_file_says_what_was_done(spec: SampleConfig) -> None:
    run_dir = Path(run_sample(spec))
    result = json.loads((run_dir / "samples.json").read_text())
    assert result["labels"] == [4, 4, 4, 0, 0, 0]
    assert result["seed"] == 9
    assert result["draft_policy"] == "sampled"
    assert 0.0 <= result["flip_rate"] <= 1.0
    assert result["weights"]["step"] == 70
    assert result["weights"]["window_size"] == 3
    assert len(result["weights"]["sha256"]) == 64
    assert result["tokenizer_fingerprint"] == Tokenizer.load(spec.tokenizer).fingerprint.digest
    assert result["num_backbone_calls"] == 2 * 9
    assert result["strip"] == "strip.png"
    assert result["strip_sample_indices"] == [0, 3]
    assert {"sampling_s", "decoding_s", "images_per_s"} <= set(result)
    assert SampleConfig.model_validate(result["spec"]) == spec


def test_a_rerun_of_a_finished_job_does_nothing_and_of_another_spec_is_refused(spec: SampleConfig) -> None:
    run_dir = Path(run_sample(spec))
    times = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    run_sample(spec.model_copy(update={"batch_size": 2}))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == times
    with pytest.raises(ArtifactError, match="got another seed; use another run_dir"):
        run_sample(spec.model_copy(update={"seed": 10}))


def test_weights_that_trained_on_are_not_taken_for_those_sampled(spec: SampleConfig) -> None:
    run_sample(spec)
    _write_model(Path(spec.weights), spec.tokenizer, window_size=2)
    with pytest.raises(ArtifactError, match=r"got another content of weights \(then of step 70\)"):
        run_sample(spec)


def test_samples_outlive_their_weights(spec: SampleConfig, caplog: pytest.LogCaptureFixture) -> None:
    run_sample(spec)
    Path(spec.weights).unlink()
    run_sample(spec)
    assert "keeps its samples; its weights cannot be compared" in caplog.text


@pytest.mark.parametrize("text", ['{"version": 1,', "{}", "[]", '{"spec": {"kind": "sample"}}'])
def test_a_damaged_record_is_named_with_what_to_do(spec: SampleConfig, text: str) -> None:
    Path(spec.run_dir).mkdir()
    (Path(spec.run_dir) / "samples.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"^.*/samples\.json: it must be the JSON .*, got .*; remove it .*$"):
        run_sample(spec)


def test_a_strip_of_a_killed_job_with_windows_does_not_stay(spec: SampleConfig) -> None:
    run_dir = Path(run_sample(spec))
    (run_dir / "samples.json").unlink()
    run_sample(spec.model_copy(update={"num_strip_images": 0}))
    assert not (run_dir / "strip.png").exists()


def test_ops_may_change_on_a_rerun(spec: SampleConfig) -> None:
    run_spec(spec)
    run_spec(spec.model_copy(update={"ops": "reference"}))


@pytest.mark.parametrize(
    ("field", "value"), [("guidance_interval", -2), ("guidance", float("inf")), ("temperature", float("nan"))]
)
def test_a_sampler_that_means_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        SamplerConfig.model_validate({field: value})


def test_a_killed_job_run_again_writes_the_same_pictures(spec: SampleConfig) -> None:
    run_dir = Path(run_sample(spec))
    before = _snapshot(run_dir)
    (run_dir / "samples.json").unlink()
    (run_dir / "grid.png").unlink()
    (run_dir / "images" / "00003.png").write_bytes(b"torn")
    (run_dir / ".staged-grid.png-1-aa").write_bytes(b"half")
    (run_dir / "images" / "00006.png").write_bytes(b"of a spec with more samples")
    run_sample(spec)
    assert _snapshot(run_dir) == before


def test_window_size_1_has_no_strip_and_says_why(spec: SampleConfig) -> None:
    _write_model(Path(spec.weights), spec.tokenizer, window_size=1)
    run_dir = Path(run_sample(spec))
    result = json.loads((run_dir / "samples.json").read_text())
    assert not (run_dir / "strip.png").exists()
    assert (result["strip"], result["strip_reason"]) == (None, "window_size is 1: nothing is refined")
    assert result["flip_rate"] is None


def test_another_tokenizer_is_refused(spec: SampleConfig, tmp_path: Path) -> None:
    foreign = _write_tokenizer(tmp_path / "foreign.safetensors", seed=1)
    with pytest.raises(ArtifactError, match="tokenizer weights_sha256 must be that of training"):
        run_sample(spec.model_copy(update={"tokenizer": foreign}))
    larger = spec.tokenizer.model_copy(update={"image_size_px": 8})
    with pytest.raises(ArtifactError, match="tokenizer codes_per_image must be that of training, 9, got 16"):
        run_sample(spec.model_copy(update={"tokenizer": larger}))


def test_the_batch_size_of_the_tokenizer_may_differ(spec: SampleConfig) -> None:
    run_sample(spec.model_copy(update={"tokenizer": spec.tokenizer.model_copy(update={"batch_size": 2})}))


def test_a_label_that_the_model_lacks_is_refused(spec: SampleConfig) -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\], got \[5\]"):
        run_sample(spec.model_copy(update={"labels": (1, 5)}))


def test_tiles_are_in_reading_order_with_white_gaps() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert tile_images(images, num_columns=2)[:, :, 0].tolist() == [
        [0, 255, 255, 1],
        [255, 255, 255, 255],
        [255, 255, 255, 255],
        [2, 255, 255, 255],
    ]


def test_a_device_that_the_machine_lacks_is_refused_in_one_line() -> None:
    for name in ("tpu", "cuda:99", ""):
        with pytest.raises(ValueError, match=rf"device must be one of auto, cpu.* got '{name}'; set device: auto"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [({}, [9] * 6), ({"stride": 3}, [3] * 6), ({"windows_per_call": 3, "draft_policy": "coupled"}, None)],
)
def test_samples_json_says_how_many_calls_each_picture_took(
    spec: SampleConfig, sampler: dict[str, Any], calls: list[int] | None
) -> None:
    config = spec.model_copy(update={"sampler": SamplerConfig(**sampler)})
    result = json.loads((Path(run_sample(config)) / "samples.json").read_text())
    assert result["stride"] == sampler.get("stride", 1)
    assert result["windows_per_call"] == sampler.get("windows_per_call", 1)
    assert len(result["calls_of_image"]) == 6
    assert result["calls_per_image"] == pytest.approx(sum(result["calls_of_image"]) / 6, abs=1e-4)
    if calls is not None:
        assert result["calls_of_image"] == calls
    else:
        assert max(result["calls_of_image"]) < 9


def test_native_and_reference_ops_draw_the_same_pictures(spec: SampleConfig, tmp_path: Path) -> None:
    native = run_sample(spec)
    reference = run_sample(spec.model_copy(update={"ops": "reference", "run_dir": str(tmp_path / "reference")}))
    assert _snapshot(Path(native)) == _snapshot(Path(reference))


def test_samples_of_a_spec_that_lacks_fields_added_since_are_finished(spec: SampleConfig) -> None:
    path = Path(run_sample(spec)) / "samples.json"
    result = json.loads(path.read_text())
    for name in ("windows_per_call", "stride", "draft_top_k", "draft_top_p"):
        del result["spec"]["sampler"][name]
    del result["spec"]["ops"]
    path.write_text(json.dumps(result))
    written_ns = path.stat().st_mtime_ns
    run_sample(spec)
    assert path.stat().st_mtime_ns == written_ns
