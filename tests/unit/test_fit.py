"""Fitting a tokenizer: it learns, it resumes to the same bytes, and its pieces equal brute force."""

import errno
import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.export import export_directory
from jobs.run import remember_spec
from jobs.verify import verify_directory
from pipeline.config import S3Config
from pipeline.storage import ArtifactError
from tokenization import fit as fit_module
from tokenization.config import FitTokenizerConfig, TokenizerConfig, VQConfig
from tokenization.fit import Fit, fit_tokenizer
from tokenization.fit_checkpoint import load_newest_checkpoint, save_checkpoint
from tokenization.fit_images import load_images
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork

NETWORK = VQConfig(codebook_size=8, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32)


def write_images(folder: Path, *, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for image_index in range(count):
        pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
        top, left = generator.integers(0, 8, 2)
        pixels[top : top + 8, left : left + 8] = generator.integers(0, 256, 3)
        path = folder / f"class{image_index % 2}" / f"{image_index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def config_in(root: Path, run: str, **changes: object) -> FitTokenizerConfig:
    return FitTokenizerConfig.model_validate(
        {
            "kind": "fit_tokenizer",
            "run_dir": str(root / run),
            "images": str(root / "train"),
            "validation_images": str(root / "validation"),
            "image_size_px": 16,
            "network": NETWORK,
            "num_steps": 75,
            "autoencoder_steps": 10,
            "batch_size": 4,
            "checkpoint_every_n_steps": 25,
            "ema_decay": 0.9,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fit")
    write_images(root / "train", count=10, seed=0)
    write_images(root / "validation", count=4, seed=1)
    fit_tokenizer(config_in(root, "whole"))
    return root


def test_a_fit_learns_and_leaves_a_usable_tokenizer(root: Path) -> None:
    lines = [json.loads(line) for line in (root / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [25, 50, 75]
    assert lines[-1]["held_out_psnr_db"] > lines[0]["held_out_psnr_db"] + 1
    config = TokenizerConfig(weights=str(root / "whole" / "tokenizer.safetensors"), image_size_px=16)
    codes = Tokenizer.load(config).encode(load_images(root / "validation", size_px=16))
    assert codes.shape == (4, 64)


def test_resuming_ends_in_the_same_bytes(root: Path) -> None:
    shutil.copytree(
        root / "whole" / "checkpoints" / "step_00000050", root / "resumed" / "checkpoints" / "step_00000050"
    )
    resumed = fit_tokenizer(config_in(root, "resumed"))
    assert resumed.read_bytes() == (root / "whole" / "tokenizer.safetensors").read_bytes()
    lines = (root / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [75]


def test_a_damaged_checkpoint_is_passed_over_loudly(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(root / "whole" / "checkpoints", root / "damaged" / "checkpoints")
    state = root / "damaged" / "checkpoints" / "step_00000075" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        resumed = fit_tokenizer(config_in(root, "damaged"))
    assert "event=checkpoint_damaged" in caplog.text
    assert "step_00000075" in caplog.text
    assert resumed.read_bytes() == (root / "whole" / "tokenizer.safetensors").read_bytes()


def test_a_finished_fit_is_left_alone(root: Path) -> None:
    path = root / "whole" / "tokenizer.safetensors"
    before = path.stat().st_mtime_ns
    assert fit_tokenizer(config_in(root, "whole")) == path
    assert path.stat().st_mtime_ns == before


def test_lost_or_damaged_weights_are_written_again_from_the_last_checkpoint(root: Path) -> None:
    whole = (root / "whole" / "tokenizer.safetensors").read_bytes()
    for damage in (b"", whole[:-1]):
        shutil.copytree(root / "whole", root / "lost", dirs_exist_ok=True)
        (root / "lost" / "tokenizer.safetensors").write_bytes(damage)
        assert fit_tokenizer(config_in(root, "lost")).read_bytes() == whole


def test_a_fit_whose_checkpoints_are_all_damaged_is_not_begun_anew(root: Path) -> None:
    shutil.copytree(root / "whole" / "checkpoints", root / "all-damaged" / "checkpoints")
    for state in (root / "all-damaged" / "checkpoints").glob("step_*/state.safetensors"):
        state.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"a checkpoint must be whole, got 2 damaged ones; put back .*or move .* away"):
        fit_tokenizer(config_in(root, "all-damaged"))


def test_a_checkpoint_of_a_fit_that_cannot_be_read_just_now_is_not_passed_over(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "whole" / "checkpoints", tmp_path / "checkpoints")
    whole = json.loads((tmp_path / "checkpoints" / "step_00000050" / "record.json").read_text())
    real_open = io.open

    def open_or_fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("step_00000075/state.safetensors"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", open_or_fail)
    with pytest.raises(OSError, match="Stale file handle"):
        load_newest_checkpoint(
            tmp_path / "checkpoints", config=config_in(root, "whole"), images_sha256=whole["images_sha256"]
        )


@pytest.mark.parametrize("record", [b"{", b"[]", b"{}", b"\xff", b""])
def test_a_checkpoint_whose_record_is_damaged_is_passed_over(root: Path, tmp_path: Path, record: bytes) -> None:
    shutil.copytree(root / "whole" / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step_00000075" / "record.json").write_bytes(record)
    whole = json.loads((tmp_path / "checkpoints" / "step_00000050" / "record.json").read_text())
    config, images_sha256 = config_in(root, "whole"), whole["images_sha256"]
    found = load_newest_checkpoint(tmp_path / "checkpoints", config=config, images_sha256=images_sha256)
    assert found is not None
    assert found[0] == 50


def test_metrics_read_after_a_resumption_as_if_there_had_been_none(root: Path) -> None:
    shutil.copytree(root / "whole", root / "cut")
    shutil.rmtree(root / "cut" / "checkpoints" / "step_00000075")
    (root / "cut" / "tokenizer.safetensors").unlink()
    with (root / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "recons')
    fit_tokenizer(config_in(root, "cut"))
    lines = (root / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [25, 50, 75]


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_kill_beside_a_checkpoint_costs_no_line_of_the_metrics(
    root: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    run = root / f"killed-{is_saved}"
    shutil.copytree(root / "whole" / "checkpoints", run / "checkpoints")
    shutil.rmtree(run / "checkpoints" / "step_00000075")
    shutil.copy(root / "whole" / "metrics.jsonl", run)

    def killed(*arguments: Any, **fields: Any) -> None:
        if is_saved:
            save_checkpoint(*arguments, **fields)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_checkpoint", killed)
        with pytest.raises(KilledError):
            fit_tokenizer(config_in(root, run.name))
    weights = fit_tokenizer(config_in(root, run.name))
    assert weights.read_bytes() == (root / "whole" / "tokenizer.safetensors").read_bytes()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [25, 50, 75]


def test_a_fit_goes_on_with_the_images_that_it_began_with_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(root / "whole" / "checkpoints", root / "more" / "checkpoints")
    another = root / "train" / "class0" / "another.png"
    shutil.copy(root / "train" / "class0" / "00.png", another)
    try:
        with pytest.raises(ValueError, match=r"step_00000075: .* that it began with, got others in .*/train; put"):
            fit_tokenizer(config_in(root, "more"))
        record = root / "more" / "checkpoints" / "step_00000075" / "record.json"
        values = json.loads(record.read_text())
        del values["images_sha256"]  # as an older version wrote it
        record.write_text(json.dumps(values))
        fit_tokenizer(config_in(root, "more"))
        assert "event=images_unknown" in caplog.text
    finally:
        another.unlink()


def test_finished_weights_are_not_replaced_by_a_fit_with_another_config(root: Path) -> None:
    shutil.copytree(root / "whole", root / "other-seed")
    shutil.rmtree(root / "other-seed" / "checkpoints")
    with pytest.raises(ValueError, match="got other seed; restore them or choose another run_dir"):
        fit_tokenizer(config_in(root, "other-seed", seed=1))
    before = (root / "whole" / "tokenizer.safetensors").read_bytes()
    assert (root / "other-seed" / "tokenizer.safetensors").read_bytes() == before


def test_a_finished_fit_is_left_alone_when_only_its_checkpoint_interval_changes(root: Path) -> None:
    path = root / "whole" / "tokenizer.safetensors"
    before = path.stat().st_mtime_ns
    fit_tokenizer(config_in(root, "whole", checkpoint_every_n_steps=5))
    assert path.stat().st_mtime_ns == before


def test_another_config_in_the_same_directory_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="got other batch_size, learning_rate; restore them or choose another run_dir"):
        fit_tokenizer(config_in(root, "whole", batch_size=5, learning_rate=0.5))


def test_unused_codes_are_restarted_and_used_ones_stay(root: Path) -> None:
    images = load_images(root / "train", size_px=16)
    fit = Fit(config_in(root, "restart", num_steps=1000, autoencoder_steps=0), images)
    fit.take_step()
    fit.network.quantize.codebook_used[-40:] = torch.arange(40) % 4
    fit.network.quantize.codebook_used[:-40] = 0
    table = fit.network.quantize.embedding.weight.detach()
    table[4:] = -table[:4]
    fit.step = 50
    before = table.clone()
    fit._restart_unused_codes(torch.from_numpy(images[:4]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.equal(table[:4], before[:4])
    assert (table[4:] != before[4:]).any(dim=1).all()
    torch.testing.assert_close(table[4:].norm(dim=1), torch.ones(4))


def test_a_step_that_is_not_finite_changes_nothing(root: Path) -> None:
    fit = Fit(config_in(root, "diverged"), load_images(root / "train", size_px=16))
    fit.take_step()
    hook = fit.network.encoder.conv_in.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in fit.state().items()}
    with pytest.raises(FloatingPointError, match=r"fit step 2: the gradient norm must be finite, got (inf|nan); lower"):
        fit.take_step()
    assert fit.step == 1
    assert all(torch.equal(value, before[name]) for name, value in fit.state().items())
    hook.remove()
    fit.network.encoder.conv_in.weight.data[0] = float("nan")
    with pytest.raises(
        FloatingPointError, match="fit step 2: the loss must be finite, got nan; lower learning_rate in a new run_dir"
    ):
        fit.take_step()


def test_a_fit_that_diverges_ends_without_weights_or_a_record_of_it(root: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"fit step \d+: .* must be finite.*lower learning_rate in a new run_dir"
    ):
        fit_tokenizer(config_in(root, "huge", learning_rate=1e9, autoencoder_steps=0, checkpoint_every_n_steps=1))
    assert not (root / "huge" / "tokenizer.safetensors").exists()
    assert not (root / "huge" / "metrics.jsonl").exists()


class SeenAtCheckpoints(logging.Handler):
    """Notes at each checkpoint whether there are weights."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.weights = weights
        self.there: list[bool] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "event=fit_checkpoint" in record.getMessage():
            self.there.append(self.weights.exists())


def test_weights_appear_once_the_codebook_is_fitted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = SeenAtCheckpoints(root / "late" / "tokenizer.safetensors")
    logger = logging.getLogger("tokenization.fit")
    logger.addHandler(handler)
    with caplog.at_level(logging.INFO):
        fit_tokenizer(config_in(root, "late", num_steps=6, autoencoder_steps=4, checkpoint_every_n_steps=2))
    logger.removeHandler(handler)
    assert handler.there == [False, False, True]
    lines = [json.loads(line) for line in (root / "late" / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out_psnr_db"] is None for line in lines] == [True, True, False]


def test_the_start_of_the_codebook_is_told_and_too_few_vectors_for_it(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = NETWORK.model_copy(update={"codebook_size": 700})
    fit = Fit(config_in(root, "few", network=network, autoencoder_steps=0), load_images(root / "train", size_px=16))
    with caplog.at_level(logging.INFO):
        fit.take_step()
    assert "event=few_vectors vectors=640 codebook_size=700 next=use more images" in caplog.text
    assert "event=kmeans_begin vectors=640 codebook_size=700" in caplog.text
    assert "event=kmeans_end elapsed_s=" in caplog.text


def test_a_tilde_in_run_dir_is_the_home_directory(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    changes = {"run_dir": "~/fit", "num_steps": 2, "autoencoder_steps": 1}
    assert fit_tokenizer(config_in(root, "", **changes)) == tmp_path / "home" / "fit" / "tokenizer.safetensors"
    names = {path.name for path in (tmp_path / "home" / "fit").iterdir()}
    assert names == {"tokenizer.safetensors", "metrics.jsonl", "checkpoints"}
    assert list((tmp_path / "work").iterdir()) == []


def test_the_smallest_size_can_be_fitted(root: Path) -> None:
    changes = {"image_size_px": 8, "num_steps": 2, "autoencoder_steps": 1}
    assert fit_tokenizer(config_in(root, "smallest", **changes)).exists()


def test_a_warm_start_begins_from_the_weights_of_the_file(root: Path) -> None:
    weights = root / "whole" / "tokenizer.safetensors"
    changes = {"warm_start": str(weights), "autoencoder_steps": 0, "num_steps": 1, "learning_rate": 1e-9}
    finished = fit_tokenizer(config_in(root, "warm", **changes))
    before, after = load_file(weights), load_file(finished)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3) for name in before)


def test_a_warm_start_from_llamagens_file_takes_the_network_of_the_spec(root: Path) -> None:
    state = VQNetwork(NETWORK).state_dict()
    torch.save({"model": state}, root / "theirs.pt")
    changes = {"warm_start": str(root / "theirs.pt"), "autoencoder_steps": 0}
    fit = Fit(config_in(root, "warm-theirs", **changes), load_images(root / "train", size_px=16))
    assert all(torch.equal(value, state[name]) for name, value in fit.network.state_dict().items())


def test_a_warm_start_from_another_network_is_refused(root: Path) -> None:
    changes = {"warm_start": str(root / "whole" / "tokenizer.safetensors"), "autoencoder_steps": 0}
    network = NETWORK.model_copy(update={"codebook_size": 16})
    with pytest.raises(ValueError, match=r"its network must be the spec's, .*codebook_size=16.*set network of a fit"):
        fit_tokenizer(config_in(root, "warm-other", network=network, **changes))


def test_a_fit_is_verified_by_its_own_rules(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "whole", tmp_path / "fit")
    remember_spec(config_in(tmp_path, "fit"))
    verdict = verify_directory(str(tmp_path / "fit"), s3=S3Config())
    told = "a tokenizer fit with weights; whole checkpoints are those of step 50, 75"
    assert (verdict.checked, verdict.problems) == (told, [])
    for path in ("checkpoints/step_00000050/state.safetensors", "tokenizer.safetensors"):
        data = (tmp_path / "fit" / path).read_bytes()
        (tmp_path / "fit" / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    verdict = verify_directory(str(tmp_path / "fit"), s3=S3Config())
    assert verdict.checked.endswith("of step 75")
    assert [problem.split(":")[0].rpartition("/")[2] for problem in verdict.problems] == [
        "step_00000050",
        "tokenizer.safetensors",
    ]


def test_an_export_of_a_fit_says_that_its_weights_are_a_file_already(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "whole", tmp_path / "fit")
    remember_spec(config_in(tmp_path, "fit"))
    with pytest.raises(
        ArtifactError, match=r"got the fit of a tokenizer.*set tokenizer\.weights to its tokenizer\.saf"
    ):
        export_directory(str(tmp_path / "fit"), to="safetensors", output=str(tmp_path / "x"), s3=S3Config())
