"""An `evaluate` job that is run again: with another spec, with settings that are free, and without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toy_corpus import sample_members, write_tar
from toy_evaluation import write_inputs

from jobs.run import run_spec
from pipeline.storage import ArtifactError
from training.evaluation.config import EvaluateConfig, FeaturesConfig, ReferenceConfig
from training.evaluation.evaluate import run_evaluate


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """An evaluation that ran to its end, of a model alone."""
    inputs = write_inputs(tmp_path_factory.mktemp("evaluate"))
    config = inputs.model_copy(update={"control": None, "tuning": None})
    run_spec(config)
    return config


@pytest.fixture
def copied(finished: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """The same with a directory of its own."""
    shutil.copytree(finished.run_dir, tmp_path / "evaluation")
    return finished.model_copy(update={"run_dir": str(tmp_path / "evaluation")})


def test_labels_beyond_the_models_classes_are_refused_before_anything_is_drawn(
    finished: EvaluateConfig, tmp_path: Path
) -> None:
    members = [member for number in range(12) for member in sample_members(number, label=number)]
    tuning = {"kind": "webdataset", "urls": [str(write_tar(tmp_path / "more-classes.tar", members))]}
    report = finished.reference.source.model_dump()
    reference = ReferenceConfig.model_validate({"source": tuning, "report_source": report, "num_images": 24})
    config = finished.model_copy(update={"run_dir": str(tmp_path / "evaluation"), "reference": reference})
    with pytest.raises(ArtifactError, match=r"labels below the model's num_classes = 3, got up to 11; name a corpus"):
        run_evaluate(config)
    assert not (tmp_path / "evaluation/stages/samples").exists()


def test_results_of_another_spec_are_never_taken(copied: EvaluateConfig) -> None:
    other = copied.model_copy(update={"seed": 10})
    rule = r"its results must be of this spec, but these fields differ: seed; set another run_dir"
    with pytest.raises(ArtifactError, match=rule):
        run_evaluate(other)
    run_evaluate(copied.model_copy(update={"device": "auto", "features": FeaturesConfig()}))  # free


def test_results_bind_their_spec_also_where_the_stages_are_gone(copied: EvaluateConfig) -> None:
    shutil.rmtree(Path(copied.run_dir) / "stages")
    with pytest.raises(ArtifactError, match=r"these fields differ: seed \(there 9, in the spec 10\)"):
        run_spec(copied.model_copy(update={"seed": 10}))
    assert json.loads((Path(copied.run_dir) / "spec.json").read_text())["seed"] == 9


def test_an_evaluation_goes_on_without_the_cache_that_it_began_with(copied: EvaluateConfig) -> None:
    (Path(copied.run_dir) / "evaluation.json").unlink()
    run_evaluate(copied.model_copy(update={"features": FeaturesConfig()}))
    assert (Path(copied.run_dir) / "evaluation.json").exists()


def test_mirror_images_do_not_set_the_threshold_of_repeated_ones(copied: EvaluateConfig) -> None:
    run_dir = Path(copied.run_dir)
    (run_dir / "evaluation.json").unlink()
    # Twelve training images at right angles to each other, each with a mirror image that is all but itself.
    images_NF = np.eye(12, 1280, dtype=np.float32)
    mirrored_NF = images_NF + 0.01 * np.eye(12, 1280, k=12, dtype=np.float32)
    features_NF = np.stack([images_NF, mirrored_NF], axis=1).reshape(24, 1280)
    np.savez(run_dir / "stages/training_set/00000.npz", features=features_NF)
    run_evaluate(copied)
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert result["memorised"]["threshold"] == pytest.approx(1.0)


def test_a_finished_job_whose_weights_are_gone_keeps_its_results(
    copied: EvaluateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Path(copied.weights)
    weights.rename(weights.with_name("elsewhere"))
    try:
        assert run_evaluate(copied) == f"{copied.run_dir}/evaluation.json"
        assert "keeps its results" in caplog.text
        (Path(copied.run_dir) / "evaluation.json").unlink()
        with pytest.raises(ArtifactError, match=r"model\.safetensors: it must be a weights file .* nothing there"):
            run_evaluate(copied)
    finally:
        weights.with_name("elsewhere").rename(weights)
