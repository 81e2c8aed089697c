"""What a run's own files say of it, by kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_checkpoints import write_checkpoint
from synthetic_shards import write_shard_set

from jobs.results import Found, Measure, find_run
from pipeline.storage import open_storage

KINDS = ("fit_tokenizer", "tokenize", "train", "sample", "evaluate")


def find(run_dir: Path, kind: str, **spec: Any) -> Found:
    return find_run(open_storage(str(run_dir)), kind=kind, spec={"num_steps": 20} | spec)


def write_lines(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(step: int, split: str, **measures: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "elapsed_s": step / 4} | measures


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_run_that_has_not_begun_nothing_is_known(tmp_path: Path, kind: str) -> None:
    assert find(tmp_path / "none", kind) == Found()


def test_a_training_run_has_its_last_held_out_losses(tmp_path: Path) -> None:
    write_lines(
        tmp_path,
        [
            line(10, "validation", loss=9.0, loss_of_offset=[8.0, 7.0], own_draft_loss_0=6.0),
            line(20, "train", loss=1.5, loss_of_offset=[1.25, 1.75]),
            line(20, "validation", loss=3.0, loss_of_offset=[2.5, 3.5], own_draft_loss_0=2.75),
        ],
    )
    measures = {"own_draft_loss_0": 2.75, "loss_0": 2.5, "loss": 3.0, "steps": 20, "seconds": 5.0}
    assert find(tmp_path, "train") == Found(is_done=False, progress="step 20 of 20", measures=measures)
    write_checkpoint(open_storage(str(tmp_path)), 20)
    assert find(tmp_path, "train").is_done
    assert not find(tmp_path, "train", num_steps=21).is_done  # it may be longer now


def test_a_training_run_without_held_out_samples_has_its_training_loss(tmp_path: Path) -> None:
    write_lines(tmp_path, [line(4, "train", loss=1.5, loss_of_offset=[None, 1.75])])
    assert find(tmp_path, "train").measures == {"train_loss_0": None, "train_loss": 1.5, "steps": 4, "seconds": 1.0}


def test_a_sample_run_has_its_flip_rate_calls_and_speed(tmp_path: Path) -> None:
    record = {"flip_rate": 0.25, "num_backbone_calls": 64, "images_per_s": 12.5, "seed": 3}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    measures = {"flip_rate": 0.25, "num_backbone_calls": 64, "images_per_s": 12.5}
    assert find(tmp_path, "sample") == Found(is_done=True, measures=measures)
    (tmp_path / "samples.json").write_text(json.dumps(record | {"flip_rate": None}))  # a window of one code
    assert find(tmp_path, "sample").measures == {"num_backbone_calls": 64, "images_per_s": 12.5}


def test_an_evaluation_has_its_headline(tmp_path: Path) -> None:
    headline = {
        "frechet": {"value": 21.5, "low": 20.0, "high": 23.0},
        "flip_rate": {"value": 0.5, "low": None, "high": None},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({"version": 1, "headline": headline}))
    measures = {"frechet": Measure(value=21.5, low=20.0, high=23.0), "flip_rate": Measure(value=0.5)}
    assert find(tmp_path, "evaluate") == Found(is_done=True, measures=measures)


def test_a_shard_set_has_its_counts(tmp_path: Path) -> None:
    write_shard_set(tmp_path / "set", samples_per_shard=(3, 4), num_views=2)
    measures = {"samples": 7, "views": 2, "shards": 2, "dropped": 0, "rejected": 0}
    assert find(tmp_path / "set", "tokenize") == Found(is_done=True, measures=measures)


def test_a_fit_is_done_when_its_weights_are_those_of_the_last_step(tmp_path: Path) -> None:
    write_lines(tmp_path, [{"step": 20, "held_out_psnr_db": 23.5, "held_out_codes_used": 400, "elapsed_s": 9.0}])
    assert not find(tmp_path, "fit_tokenizer").is_done
    (tmp_path / "tokenizer.safetensors").write_bytes(b"")
    measures = {"steps": 20, "psnr_db": 23.5, "codes_used": 400}
    assert find(tmp_path, "fit_tokenizer") == Found(is_done=True, progress="step 20 of 20", measures=measures)
    assert not find(tmp_path, "fit_tokenizer", num_steps=40).is_done


@pytest.mark.parametrize("text", ["{", "{}", '{"headline": {"x": {}}}', '{"headline": 3}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    found = find(tmp_path, "evaluate")
    assert not found.is_done
    assert found.problem is not None
    assert found.problem.startswith(
        f"read the results of {tmp_path}: its files must be those of a run of kind evaluate, got "
    )
    assert found.problem.endswith("; remove the directory to run it anew")
    assert "\n" not in found.problem
