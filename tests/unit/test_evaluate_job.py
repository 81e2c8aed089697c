"""The `evaluate` job and its report: what it promises to write, resumption part by part, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_corpus import write_tiny_tokenizer
from toy_evaluation import result_of, write_inputs, write_model

from jobs.evaluation_report import evaluate_and_report
from jobs.run import run_spec
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError, open_storage
from tokenization.tokenizer import Tokenizer
from training.evaluation.adm_npz import read_adm_npz
from training.evaluation.config import EvaluateConfig, ReferenceConfig
from training.evaluation.distances import frechet_distance, kernel_distance
from training.evaluation.evaluate import read_evaluation, run_evaluate
from training.evaluation.features import load_features
from training.evaluation.image_features import FeatureReader, TrainingImages, reference_features
from training.evaluation.real_images import choose_images, crop_images
from training.evaluation.samples import proportional_labels
from training.evaluation.stages import Stages
from training.sampling import sample_codes
from training.weights import load_model

LEFT = {"evaluation.json", "report.html", "samples.npz", "pictures.npz"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """An evaluation that ran to its end."""
    config = write_inputs(tmp_path_factory.mktemp("evaluate"))
    assert run_spec(config) == f"{config.run_dir}/report.html"
    return config


@pytest.fixture
def copied(finished: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """The same with a directory of its own."""
    shutil.copytree(finished.run_dir, tmp_path / "evaluation")
    return finished.model_copy(update={"run_dir": str(tmp_path / "evaluation")})


def test_all_that_is_promised_is_written_and_agrees(finished: EvaluateConfig) -> None:
    run_dir = Path(finished.run_dir)
    assert {path.name for path in run_dir.iterdir() if path.is_file()} - {".lock", "spec.json"} == LEFT
    result = read_evaluation(open_storage(finished.run_dir))
    assert EvaluateConfig.model_validate(result["spec"]) == finished
    assert (result["version"], result["weights"]["step"], result["weights"]["window_size"]) == (1, 7, 3)
    assert result["reference"]["num_tuning"] + result["reference"]["num_report"] == 24
    assert result["cost"] == {"backbone_calls_per_image": 16.0, "batch_size": 16}
    assert [entry["guidance"] for entry in result["tuning"]] == [1.0, 3.0]
    best = min(result["tuning"], key=lambda entry: entry["frechet_distance"])
    assert result["sampler"]["guidance"] == best["guidance"]
    assert result["flips"]["draft_policy"] == "coupled"
    assert [len(result["flips"][name]) for name in ("of_position", "of_offset")] == [16, 3]
    assert result["held_out"]["num_samples"] == 10
    assert result["held_out"]["offset_0"]["own_drafts"]["num_groups"] == 6  # pairs of the twelve
    parts = result["held_out"]["differences"]
    assert parts["gap"]["value"] == pytest.approx(parts["draft_shift"]["value"] + parts["interference"]["value"])
    distance = result["measures"]["frechet_distance"]
    counts = [distance[of]["num_samples"] for of in ("samples", "real", "decoded")]
    assert counts[0] == counts[1] == counts[2]
    assert distance["samples"]["value"] > distance["real"]["value"]
    assert result["memorised"]["num_training_images"] == 24
    headline = result["headline"]
    assert headline["gap"] == {part: parts["gap"][part] for part in ("value", "low", "high")}
    assert headline["frechet_distance_real"]["value"] == distance["real"]["value"]
    assert headline["flip_rate"] == {"value": result["flips"]["flip_rate"]}
    assert set(result["measures"]["label_score"]["top_1_of_class"]["samples"]) == {"0", "1", "2"}


def test_several_windows_a_call_change_the_calls_and_nothing_else(finished: EvaluateConfig, tmp_path: Path) -> None:
    sampler = finished.sampler.model_copy(update={"windows_per_call": 4})
    fast = finished.model_copy(update={"run_dir": str(tmp_path / "evaluation"), "sampler": sampler})
    run_evaluate(fast)
    plain, found = (read_evaluation(open_storage(config.run_dir)) for config in (finished, fast))
    assert 16 / 4 <= found["cost"]["backbone_calls_per_image"] < 16
    assert found["measures"] == plain["measures"]
    assert found["flips"] == plain["flips"]


def test_the_samples_are_those_of_the_chosen_sampler_with_labels_in_proportion(finished: EvaluateConfig) -> None:
    result = read_evaluation(open_storage(finished.run_dir))
    model, _ = load_model(finished.weights)
    labels = torch.tensor([0] * 5 + [1] * 4 + [2] * 5)  # 8 real images of each class, 14 samples
    sampler = finished.sampler.model_copy(update={"guidance": result["sampler"]["guidance"]})
    codes_NT = sample_codes(model, labels, config=sampler, seed=9).codes_NT
    images = read_adm_npz(Path(finished.run_dir) / "samples.npz")
    assert np.array_equal(images, Tokenizer.load(finished.tokenizer).decode(codes_NT.numpy()))
    pictures = np.load(Path(finished.run_dir) / "pictures.npz")
    assert np.array_equal(pictures["grid"], images[[0, 1, 2, 9, 10, 11]])  # the two most frequent classes
    assert np.array_equal(pictures["strips"][:, -1], images[[0, 9, 1]])  # refined to the end
    assert pictures["nearest_training"].shape == (4, 16, 16, 3)
    control, _ = load_model(str(finished.control.weights)) if finished.control else (model, None)
    shown = torch.tensor([0, 1, 2, 9, 10, 11])
    control_codes = sample_codes(control, labels[shown], config=sampler, seed=9, sample_counters_N=shown).codes_NT
    expected = Tokenizer.load(finished.tokenizer).decode(control_codes.numpy())
    assert np.array_equal(pictures["control_grid"], expected)


def test_samplers_are_judged_by_the_tuning_half_on_draws_of_their_own(finished: EvaluateConfig) -> None:
    stages = Path(finished.run_dir) / "stages"
    reference = np.load(stages / "reference" / "00000.npz")
    real_NF = reference["real"][~reference["in_report_half"]]
    loaded, _ = load_model(finished.weights, device=torch.device("cpu"), dtype=torch.float32)
    loaded.use_native_ops()
    labels = torch.from_numpy(proportional_labels(np.sort(reference["labels"]), num_samples=6))
    for index, entry in enumerate(read_evaluation(open_storage(finished.run_dir))["tuning"]):
        drawn = np.load(stages / f"tuning/{index:04d}" / "00000.npz")
        assert entry["frechet_distance"] == pytest.approx(frechet_distance(drawn["features"], real_NF), rel=1e-9)
        sampled = sample_codes(
            loaded,
            labels,
            config=finished.sampler.model_copy(update={"guidance": entry["guidance"]}),
            seed=9,
            sample_counters_N=torch.arange(14, 20),  # the reported samples have 0 to 13
        )
        assert np.array_equal(drawn["codes"], sampled.codes_NT.numpy())


def test_a_finished_job_does_nothing(finished: EvaluateConfig) -> None:
    files = {path: path.stat().st_mtime_ns for path in Path(finished.run_dir).rglob("*") if path.is_file()}
    evaluate_and_report(finished)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_what_is_missing_is_made_again_and_nothing_else(finished: EvaluateConfig, copied: EvaluateConfig) -> None:
    run_dir = Path(copied.run_dir)
    lost = [
        "evaluation.json",
        "report.html",
        "pictures.npz",
        "stages/samples/00000.npz",
        "stages/measures/manifold.json",
    ]
    for name in lost:
        (run_dir / name).unlink()
    (run_dir / "stages" / ".staged-reference-1-aa").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "stages").rglob("*.npz")}
    evaluate_and_report(copied)
    assert result_of(copied) == result_of(finished)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(run_dir.rglob(".staged-*"))
    assert np.array_equal(
        np.load(run_dir / "pictures.npz")["strips"], np.load(Path(finished.run_dir) / "pictures.npz")["strips"]
    )


def test_another_spec_or_other_weights_in_the_same_directory_are_refused(
    copied: EvaluateConfig, tmp_path: Path
) -> None:
    run_spec(copied.model_copy(update={"device": "auto"}))  # free
    with pytest.raises(ArtifactError, match=r"these fields differ: seed \(there 9, in the spec 10\)"):
        run_spec(copied.model_copy(update={"seed": 10}))
    tokenizer = Tokenizer.load(copied.tokenizer)
    trained_on = write_model(tmp_path / "trained-on.safetensors", tokenizer=tokenizer, window_size=3, seed=8)
    with pytest.raises(ArtifactError, match="got another content of weights; set another run_dir"):
        run_evaluate(copied.model_copy(update={"weights": str(trained_on)}))
    (Path(copied.run_dir) / "evaluation.json").unlink()
    with pytest.raises(ArtifactError, match="what it has begun with must not have changed since, but these have: spec"):
        run_evaluate(copied.model_copy(update={"weights": str(trained_on)}))


def test_held_out_codes_that_were_made_anew_since_are_refused(copied: EvaluateConfig) -> None:
    (Path(copied.run_dir) / "evaluation.json").unlink()
    held_out = Path(copied.held_out.shards)
    held_out.rename(held_out.with_name("before"))
    try:
        shutil.copytree(held_out.with_name("training"), held_out)  # as many samples
        with pytest.raises(ArtifactError, match=r"these have: held_out\.shards \(then '\w+', now '\w+'\); set another"):
            run_evaluate(copied)
    finally:
        shutil.rmtree(held_out)
        held_out.with_name("before").rename(held_out)


def test_the_report_is_whole_and_escapes_what_comes_from_the_corpus(copied: EvaluateConfig) -> None:
    run_dir = Path(copied.run_dir)
    result = json.loads((run_dir / "evaluation.json").read_text())
    result["class_names"] = ["<script>", "bear", "car"]
    (run_dir / "evaluation.json").write_text(json.dumps(result))
    (run_dir / "report.html").unlink()
    evaluate_and_report(copied)
    page = (run_dir / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "http://www.w3.org" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    assert "Its guidance lies at the edge of what was tried" in page  # 1 and 3 were
    for title in ("Samples against real images", "Held-out prediction", "Refinement", "Nearest training images"):
        assert title in page
    assert page.count("<svg") == 5
    assert page.count("data:image/png") >= 6 + 6 + 9 + 8  # grid, control, strips, pairs


def test_a_model_without_windows_or_control_is_evaluated_as_well(finished: EvaluateConfig, tmp_path: Path) -> None:
    assert finished.control is not None
    alone = finished.model_copy(
        update={
            "run_dir": str(tmp_path / "alone"),
            "weights": finished.control.weights,
            "control": None,
            "training_set": None,
            "tuning": None,
        }
    )
    evaluate_and_report(alone)
    result = result_of(alone)
    assert (result["control"], result["memorised"], result["tuning"]) == (None, None, None)
    assert result["flips"]["flip_rate"] is None
    assert result["held_out"]["differences"]["draft_shift"]["value"] == 0.0
    of_drafts = {"draft_shift", "draft_gain", "interference", "loss_schedule", "flip_rate"}
    assert not of_drafts & set(result["headline"])
    assert of_drafts <= set(result_of(finished)["headline"])
    assert "loss_own_drafts" in result["headline"]
    # The reference, its halves and its floors are those of every other job over the corpus.
    for of in ("real", "decoded"):
        theirs = result_of(finished)["measures"]["frechet_distance"][of]
        assert result["measures"]["frechet_distance"][of] == theirs


def test_a_corpus_of_its_own_to_report_against_gives_the_report_half_and_the_labels_of_the_samples(
    finished: EvaluateConfig, tmp_path: Path
) -> None:
    tars = (
        Path(finished.reference.source.urls[0]).parent if finished.reference.source.kind == "webdataset" else tmp_path
    )
    sources = [{"kind": "webdataset", "urls": [f"{tars}/{tar}.tar"]} for tar in (0, 1)]
    reference = ReferenceConfig.model_validate({"source": sources[0], "report_source": sources[1], "num_images": 12})
    config = finished.model_copy(update={"run_dir": str(tmp_path / "evaluation"), "reference": reference})
    run_evaluate(config)
    halves = np.load(tmp_path / "evaluation/stages/reference/00000.npz")
    assert halves["in_report_half"].tolist() == [False] * 12 + [True] * 12
    expected = sorted(image.label for image in choose_images(reference, s3=finished.s3) if image.in_report_half)
    result = read_evaluation(open_storage(config.run_dir))
    assert (result["reference"]["num_tuning"], result["reference"]["num_report"]) == (12, 12)
    drawn = np.load(tmp_path / "evaluation/stages/samples/00000.npz")
    loaded, _ = load_model(finished.weights, device=torch.device("cpu"), dtype=torch.float32)
    loaded.use_native_ops()
    labels = torch.from_numpy(proportional_labels(np.array(expected), num_samples=14))
    sampler = finished.sampler.model_copy(update={"guidance": result["sampler"]["guidance"]})
    counters = torch.arange(14)
    sampled = sample_codes(loaded, labels, config=sampler, seed=9, sample_counters_N=counters)
    assert np.array_equal(drawn["codes"], sampled.codes_NT.numpy())
    floors = result["measures"]["kernel_distance_of_class_decoded"]
    assert set(floors) == {"0", "1", "2"}
    of_class = halves["labels"] == 1
    decoded_NF = halves["decoded"][of_class & ~halves["in_report_half"]].astype(np.float64)
    real_NF = halves["real"][of_class & halves["in_report_half"]].astype(np.float64)
    assert floors["1"]["value"] == pytest.approx(kernel_distance(decoded_NF, real_NF))


def test_inputs_that_do_not_belong_together_are_refused(finished: EvaluateConfig, tmp_path: Path) -> None:
    foreign = write_tiny_tokenizer(tmp_path / "foreign.safetensors", seed=1)
    config = finished.model_copy(
        update={
            "run_dir": str(tmp_path / "refused"),
            "tokenizer": finished.tokenizer.model_copy(update={"weights": str(foreign)}),
        }
    )
    with pytest.raises(ArtifactError, match="tokenizer weights_sha256 must be that of training"):
        run_evaluate(config)


def test_a_half_of_the_reference_holds_its_images_and_what_their_codes_decode_to(
    finished: EvaluateConfig, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(finished.tokenizer)
    features = load_features("efficientnet-lite0", device="cpu")
    reader = FeatureReader(features, cache_dir=finished.features.cache_dir)
    reference = reference_features(
        Stages(open_storage(str(tmp_path))), finished.reference, tokenizer=tokenizer, reader=reader, s3=finished.s3
    )
    chosen = [image for image in choose_images(finished.reference, s3=finished.s3) if image.in_report_half]
    assert reference.report.labels_N.tolist() == [image.label for image in chosen]
    pixels_NHWC, _ = crop_images(chosen[:3], image_size_px=16)
    decoded_NHWC = tokenizer.decode(tokenizer.encode(pixels_NHWC))
    expected = features.extract(np.concatenate([pixels_NHWC, decoded_NHWC]))
    np.testing.assert_allclose(reference.report.real_NF[:3], expected[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference.report.decoded_NF[:3], expected[3:], rtol=1e-4, atol=1e-5)


def test_training_images_are_decoded_view_by_view_of_samples_spread_over_the_set(finished: EvaluateConfig) -> None:
    assert finished.training_set is not None
    config = finished.training_set.model_copy(update={"num_samples": 3})
    tokenizer = Tokenizer.load(finished.tokenizer)
    images = TrainingImages(config, tokenizer=tokenizer, s3=finished.s3)
    shard_set = ShardSet.open(config.shards)
    places = [(sample, view) for sample in (0, 4, 8) for view in (0, 1)]  # of twelve
    codes = [shard_set.read_batch(np.array([sample]), views=np.array([view]))[0] for sample, view in places]
    decoded_NHWC = tokenizer.decode(np.concatenate(codes))
    assert len(images) == 6
    assert np.array_equal(images.decode(np.array([5, 0, 3])), decoded_NHWC[[5, 0, 3]])
    assert not np.array_equal(decoded_NHWC[0], decoded_NHWC[1])


def test_tuning_may_leave_the_tokenizer_out(finished: EvaluateConfig, tmp_path: Path) -> None:
    assert finished.tuning is not None
    tuning = finished.tuning.model_copy(update={"against": "decoded"})
    config = finished.model_copy(update={"run_dir": str(tmp_path / "evaluation"), "tuning": tuning})
    run_evaluate(config)
    storage = open_storage(config.run_dir)
    reader = FeatureReader(load_features("efficientnet-lite0", device="cpu"), cache_dir=finished.features.cache_dir)
    tokenizer = Tokenizer.load(finished.tokenizer)
    reference = reference_features(
        Stages(storage), finished.reference, tokenizer=tokenizer, reader=reader, s3=finished.s3
    )
    tried = read_evaluation(storage)["tuning"]
    for index, entry in enumerate(tried):
        drawn_NF = np.load(tmp_path / "evaluation" / "stages" / f"tuning/{index:04d}" / "00000.npz")["features"]
        expected = frechet_distance(drawn_NF, reference.tuning.decoded_NF)
        assert entry["frechet_distance"] == pytest.approx(expected, rel=1e-6)


def test_a_report_without_nearest_pairs_is_whole(copied: EvaluateConfig, tmp_path: Path) -> None:
    config = copied.model_copy(
        update={"run_dir": str(tmp_path / "new"), "shown": copied.shown.model_copy(update={"num_nearest": 0})}
    )
    evaluate_and_report(config)
    result = read_evaluation(open_storage(config.run_dir))
    assert result["pictures"]["nearest"] == []
    assert result["memorised"]["samples"]["num_images"] == 14
    assert "Nearest training images" in (tmp_path / "new" / "report.html").read_text()


def test_a_stride_beyond_a_window_is_refused_before_anything_is_made(copied: EvaluateConfig, tmp_path: Path) -> None:
    assert copied.control is not None
    strided = copied.sampler.model_copy(update={"stride": 3})
    narrow = write_model(
        tmp_path / "narrow.safetensors", tokenizer=Tokenizer.load(copied.tokenizer), window_size=2, seed=6
    )
    control = copied.control.model_copy(update={"weights": str(narrow)})
    cases = [
        (
            {"sampler": strided.model_copy(update={"stride": 4})},
            r"model\.safetensors: sampler\.stride must .* = 3\], got 4",
        ),
        (
            {"sampler": strided, "control": control},
            r"narrow\.safetensors: sampler\.stride, the control's too .* = 2\], got 3",
        ),
        (
            {"control": control.model_copy(update={"sampler": strided})},
            r"narrow\.safetensors: control\.sampler\.stride must be in \[1, its window_size = 2\], got 3; lower it",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            run_evaluate(copied.model_copy(update={"run_dir": str(tmp_path / "new")} | changes))
    assert not (tmp_path / "new" / "stages").exists()


def test_what_another_job_left_is_not_taken_for_this_ones(finished: EvaluateConfig, copied: EvaluateConfig) -> None:
    run_dir = Path(copied.run_dir)
    shutil.rmtree(run_dir / "stages")
    (run_dir / "evaluation.json").unlink()
    for name in ("samples.npz", "pictures.npz", "report.html"):
        (run_dir / name).write_bytes(b"another's")
    evaluate_and_report(copied)
    assert (run_dir / "samples.npz").read_bytes() == (Path(finished.run_dir) / "samples.npz").read_bytes()
    assert "Samples against real images" in (run_dir / "report.html").read_text()


def test_an_evaluation_goes_on_with_a_program_that_has_more_fields(copied: EvaluateConfig) -> None:
    class Later(EvaluateConfig):
        added_since: int = 3

    (Path(copied.run_dir) / "evaluation.json").unlink()
    run_evaluate(Later.model_validate(copied.model_dump()))
    (Path(copied.run_dir) / "evaluation.json").unlink()
    with pytest.raises(ArtifactError, match="these have: spec"):
        run_evaluate(Later.model_validate(copied.model_dump() | {"added_since": 4}))


@pytest.mark.parametrize("name", ["evaluation.json", "stages/inputs.json"])
def test_a_torn_record_is_named_with_what_to_do(copied: EvaluateConfig, name: str) -> None:
    if name != "evaluation.json":
        (Path(copied.run_dir) / "evaluation.json").unlink()
    (Path(copied.run_dir) / name).write_text('{"version": 1,')
    with pytest.raises(ArtifactError, match=rf"/{name}: it must be .* JSON.*, got .*; remove"):
        run_evaluate(copied)
