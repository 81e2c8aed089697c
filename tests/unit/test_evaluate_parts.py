"""The parts of an evaluation: labels in proportion, flips, the choice of images, held-out scores, committed stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_shards import CODEBOOK_SIZE, CODES_PER_SIDE, NUM_CLASSES, codes_of, write_shard_set
from torch.nn import functional as F
from toy_corpus import write_tar, write_tars

from jobs.evaluation_charts import tuning_chart
from pipeline.config import S3Config, WebDatasetConfig
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError, open_storage
from training.config import ModelConfig, NoiseConfig, SamplerConfig
from training.evaluation.config import BootstrapConfig, ReferenceConfig, ShownConfig, TuningConfig
from training.evaluation.draft_shift import summarise_held_out
from training.evaluation.features import Features
from training.evaluation.flips import flip_rates
from training.evaluation.held_out import score_held_out, spread_indices
from training.evaluation.image_features import FeatureReader, Half, Reference
from training.evaluation.intervals import Intervals
from training.evaluation.memorised import find_memorised
from training.evaluation.pictures import choose_shown
from training.evaluation.real_images import choose_images, crop_images, is_in_report_half
from training.evaluation.samples import SampleSet, proportional_labels
from training.evaluation.stages import Stages, joined
from training.evaluation.tuning import fields_at_edge
from training.noise import draft_windows, make_windows, noise_windows
from training.tensorar import TensorAR, build_model


def test_labels_come_in_the_proportions_of_the_reference() -> None:
    reference = np.array([0] * 10 + [2] * 30 + [7] * 60)
    labels = proportional_labels(reference, num_samples=20)
    assert np.bincount(labels, minlength=8).tolist() == [2, 0, 6, 0, 0, 0, 0, 12]
    assert proportional_labels(reference, num_samples=3).tolist() == [2, 7, 7]
    assert np.bincount(proportional_labels(reference, num_samples=250), minlength=8).tolist()[2] == 75


def test_flips_are_counted_by_position_and_by_the_offset_of_the_draft() -> None:
    # Two samples, three codes, K = 3; a row of a code is its refinements, first draft to final.
    drafts = np.array([[[5, 5, 5], [1, 1, 2], [3, 4, 4]], [[5, 5, 5], [2, 2, 2], [3, 3, 4]]])
    flips = flip_rates(drafts)
    assert flips["flip_rate"] == 0.75  # positions 1 and 2: 2 of 2 samples at the last, 1 of 2 before
    assert flips["of_position"] == [None, 0.5, 1.0]
    # Offset 1 drafts codes 1 and 2 (refinement 1): 2 of 4 differ; offset 2 drafts code 2 alone: both differ.
    assert flips["of_offset"] == [None, 0.5, 1.0]
    strided = flip_rates(drafts, stride=2)
    assert (strided["flip_rate"], strided["of_offset"]) == (0.75, [None, None, None])
    assert flip_rates(drafts[:, :, :1]) == {"flip_rate": None, "of_position": [None] * 3, "of_offset": [None]}


def test_shown_classes_are_the_most_frequent_and_strips_go_from_class_to_class() -> None:
    labels = np.array([0, 1, 1, 1, 4, 4, 9])
    shown = choose_shown(labels, shown=ShownConfig(num_labels=2, num_per_label=2, num_strips=3))
    assert shown.labels_C.tolist() == [1, 4]
    assert shown.grid.tolist() == [1, 2, 4, 5]
    assert shown.strips == [1, 4, 2]


def test_every_combination_of_the_tuned_values_is_tried() -> None:
    samplers = TuningConfig(guidance=(1.0, 2.0), top_k=(0, 5)).samplers(SamplerConfig(temperature=0.7))
    assert [(sampler.top_k, sampler.guidance) for sampler in samplers] == [(0, 1.0), (0, 2.0), (5, 1.0), (5, 2.0)]
    assert {sampler.temperature for sampler in samplers} == {0.7}
    policies = TuningConfig(guidance=(1.0,), draft_policy=("sampled", "argmax")).samplers(SamplerConfig())
    assert [(sampler.guidance, sampler.draft_policy) for sampler in policies] == [(1.0, "sampled"), (1.0, "argmax")]
    with pytest.raises(ValueError, match="tuning must name values of at least one of temperature"):
        TuningConfig()


def reference_of(urls: str, **fields: object) -> ReferenceConfig:
    source = WebDatasetConfig(kind="webdataset", urls=(urls,))
    return ReferenceConfig.model_validate({"source": source.model_dump(), "num_images": 8, **fields})


def tried(**distances: float) -> list[dict[str, float]]:
    return [{"top_p": float(name[1:]) / 100, "frechet_distance": value} for name, value in distances.items()]


def test_a_best_value_at_the_edge_of_those_tried_is_told() -> None:
    assert fields_at_edge(tried(p60=1.0, p75=2.0, p90=3.0)) == ("top_p",)
    assert fields_at_edge(tried(p60=2.0, p75=1.0, p90=3.0)) == ()
    assert fields_at_edge(tried(p60=3.0, p75=2.0, p90=1.0)) == ("top_p",)
    assert fields_at_edge(tried(p75=3.0, p90=2.0, p100=1.0)) == ()  # there is nothing beyond 1
    assert fields_at_edge(tried(p75=1.0)) == ()
    assert fields_at_edge(tried(p60=1.0, p75=1.0, p90=1.0)) == ()  # it makes no difference
    codes = [{"top_k": 10, "frechet_distance": 2.0}, {"top_k": 0, "frechet_distance": 1.0}]
    assert fields_at_edge(codes) == ()  # 0 is all codes
    assert fields_at_edge([codes[1] | {"frechet_distance": 3.0}, codes[0]]) == ("top_k",)
    policies = [
        {"draft_policy": "argmax", "frechet_distance": 2.0},
        {"draft_policy": "coupled", "frechet_distance": 1.0},
    ]
    assert fields_at_edge(policies) == ()  # names have no order
    assert fields_at_edge([*codes, {"top_k": 90, "frechet_distance": 0.5}]) == ()  # between 10 and all


def test_the_chart_of_the_tuning_names_numbers_and_policies() -> None:
    svg = tuning_chart(
        [
            {"guidance": 1.5, "draft_policy": "coupled", "frechet_distance": 40.0},
            {"guidance": 2.0, "draft_policy": "argmax", "frechet_distance": 30.0},
        ]
    )
    assert svg.index("guidance 2, draft_policy argmax") < svg.index("guidance 1.5, draft_policy coupled")


def test_the_chosen_images_are_a_part_of_a_larger_choice(tmp_path: Path) -> None:
    urls = write_tars(tmp_path, num_tars=2, samples_per_tar=10)
    chosen = choose_images(reference_of(urls), s3=S3Config())
    more = choose_images(reference_of(urls, num_images=12), s3=S3Config())
    assert len(chosen) == 8
    assert chosen == more[:8]
    assert chosen[0].label == int(chosen[0].name[-4:]) % 3
    assert {image.in_report_half for image in more} == {False, True}
    assert len(choose_images(reference_of(urls, num_images=100), s3=S3Config())) == 20


def test_images_of_a_group_are_in_one_half(tmp_path: Path) -> None:
    urls = write_tars(tmp_path, num_tars=2, samples_per_tar=10)
    by_field = choose_images(reference_of(urls, num_images=20, group_field="group"), s3=S3Config())
    assert {image.in_report_half for image in by_field} == {is_in_report_half("toys")}
    by_prefix = choose_images(reference_of(urls, num_images=20, group_separator="0"), s3=S3Config())
    assert {image.in_report_half for image in by_prefix} == {is_in_report_half("s")}
    with pytest.raises(
        ArtifactError,
        match=r"sample s0000: group_field must be a field of every sample, got .concept., but it has only group",
    ):
        choose_images(reference_of(urls, group_field="concept"), s3=S3Config())


def test_two_corpora_are_the_two_halves(tmp_path: Path) -> None:
    write_tars(tmp_path, num_tars=2, samples_per_tar=10)
    other = {"kind": "webdataset", "urls": [f"{tmp_path}/00001.tar"]}
    reference = reference_of(f"{tmp_path}/00000.tar", report_source=other)
    halves = [(image.name, image.in_report_half) for image in choose_images(reference, s3=S3Config())]
    alone = [
        [image.name for image in choose_images(reference_of(f"{tmp_path}/{tar}.tar"), s3=S3Config())]
        for tar in ("00000", "00001")
    ]
    assert halves == [(name, False) for name in alone[0]] + [(name, True) for name in alone[1]]
    assert len(halves) == 16


def test_a_group_in_both_corpora_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path, num_tars=2, samples_per_tar=10)
    other = {"kind": "webdataset", "urls": [f"{tmp_path}/00001.tar"]}
    reference = reference_of(f"{tmp_path}/00000.tar", report_source=other, group_field="group")
    rule = r"no group of reference\.report_source may be in reference\.source, got 'toys' and 0 more in both; take"
    with pytest.raises(ArtifactError, match=rule):
        choose_images(reference, s3=S3Config())


def test_an_image_that_cannot_be_read_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tars(tmp_path, num_tars=1, samples_per_tar=4)
    write_tar(tmp_path / "00001.tar", [("alone.json", b'{"label": 1}')])
    assert len(choose_images(reference_of(f"{tmp_path}/*.tar"), s3=S3Config())) == 4
    assert "image=1/alone rejected reason=" in caplog.text


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    write_tars(tmp_path, num_tars=1, samples_per_tar=4)
    write_tar(tmp_path / "00001.tar", [("bad.png", b"no image"), ("bad.json", b'{"label": 1}')])
    images = choose_images(reference_of(f"{tmp_path}/*.tar"), s3=S3Config())
    pixels, places = crop_images(images, image_size_px=16)
    assert pixels.shape == (4, 16, 16, 3)
    assert [images[place].name for place in range(5) if place not in places] == ["1/bad"]


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    return ShardSet.open(write_shard_set(tmp_path / "set", samples_per_shard=(7, 5)))


def model_of(window_size: int) -> TensorAR:
    torch.manual_seed(3)
    config = ModelConfig(
        num_layers=1,
        num_heads=2,
        model_dim=16,
        codebook_size=CODEBOOK_SIZE,
        codes_per_side=CODES_PER_SIDE,
        num_classes=NUM_CLASSES,
        window_size=window_size,
    )
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def test_scores_are_those_of_full_logits_sample_by_sample(shard_set: ShardSet) -> None:
    model, indices, seed = model_of(3), np.array([1, 4, 11]), 6
    # With no noise the windows are the true ones, so that the expected scores need no draw.
    scores = score_held_out(model, shard_set, indices, noise=NoiseConfig(schedule="none"), seed=seed)
    codes = np.stack([codes_of(i, num_views=1, codebook_size=16, num_codes=16)[0] for i in indices]).astype(np.int64)
    codes_BT, labels_B = torch.from_numpy(codes), torch.from_numpy(indices % 4)
    windows_BTK, _ = make_windows(codes_BT, window_size=3)
    drafts_BTK = draft_windows(
        model, windows_BTK, labels_B, seed=seed, step=0, sample_counters_B=torch.from_numpy(indices)
    )
    uniform_BTK = noise_windows(
        codes_BT,
        betas=[0, 1, 1],
        codebook_size=16,
        coupling="independent",
        seed=seed,
        step=0,
        sample_counters_B=torch.from_numpy(indices),
    )
    for kind, windows in (("schedule", windows_BTK), ("own_drafts", drafts_BTK), ("uninformed", uniform_BTK)):
        with torch.no_grad():
            logits_BTKV = model(windows, labels_B)
        for sample in range(3):
            for offset in range(3):
                logits = logits_BTKV[sample, : 16 - offset, offset]
                targets = codes_BT[sample, offset:]
                expected = F.cross_entropy(logits, targets).item()
                assert scores[f"loss_{kind}"][sample, offset] == pytest.approx(expected, rel=1e-5)
                hits = (logits.argmax(-1) == targets).double().mean().item()
                assert scores[f"accuracy_{kind}"][sample, offset] == pytest.approx(hits)
    assert not np.allclose(scores["loss_uninformed"], scores["loss_schedule"])
    assert not np.allclose(scores["loss_uninformed"], scores["loss_own_drafts"])


def test_scores_do_not_depend_on_the_batch(shard_set: ShardSet) -> None:
    model, noise = model_of(3), NoiseConfig()
    whole = score_held_out(model, shard_set, np.arange(12), noise=noise, seed=1)
    alone = score_held_out(model, shard_set, np.array([8]), noise=noise, seed=1)
    for name, values in alone.items():
        assert values[0] == pytest.approx(whole[name][8], rel=1e-5)


def test_without_windows_all_kinds_of_drafts_are_one(shard_set: ShardSet) -> None:
    scores = score_held_out(model_of(1), shard_set, np.arange(4), noise=NoiseConfig(), seed=1)
    assert scores["loss_own_drafts"].shape == (4, 1)
    assert np.array_equal(scores["loss_own_drafts"], scores["loss_schedule"])
    assert np.array_equal(scores["loss_uninformed"], scores["loss_schedule"])


def test_a_label_beyond_the_models_classes_is_refused(tmp_path: Path) -> None:
    foreign = ShardSet.open(write_shard_set(tmp_path / "foreign", samples_per_shard=(3,), label=9))
    with pytest.raises(ArtifactError, match="labels must be below the model's num_classes = 4, got 9"):
        score_held_out(model_of(1), foreign, np.arange(3), noise=NoiseConfig(), seed=1)


def test_draft_shift_and_interference_add_up_to_the_gap() -> None:
    def scores(schedule: float, own_drafts: float, uninformed: float) -> dict[str, np.ndarray]:
        losses = {"schedule": schedule, "own_drafts": own_drafts, "uninformed": uninformed}
        values = {f"loss_{kind}": np.array([[loss - 0.5, 9.0], [loss + 0.5, 9.0]]) for kind, loss in losses.items()}
        return values | {f"accuracy_{kind}": np.array([[0.25, 0.0], [0.75, 0.0]]) for kind in losses}

    intervals = Intervals(BootstrapConfig(num_resamples=20), seed=0)
    summary = summarise_held_out(scores(3.25, 4.0, 3.75), scores(9.0, 3.5, 7.0), intervals=intervals)
    values = {name: difference["value"] for name, difference in summary["differences"].items()}
    assert values == {
        "draft_shift": 0.75,
        "draft_gain": -0.25,
        "interference": -0.25,
        "interference_uninformed": 0.25,
        "gap": 0.5,
    }
    assert summary["offset_0"]["own_drafts"]["value"] == 4.0
    assert summary["model"]["schedule"] == {"loss_of_offset": [3.25, 9.0], "accuracy_of_offset": [0.5, 0.0]}
    # Differences are paired: both samples have the same, so there is nothing to be uncertain about.
    assert (summary["differences"]["gap"]["low"], summary["differences"]["gap"]["high"]) == (0.5, 0.5)
    assert summary["control_offset_0"]["value"] == 3.5  # with the drafts that it would have in sampling
    assert "gap" not in summarise_held_out(scores(1, 1, 1), None, intervals=intervals)["differences"]
    in_groups = summarise_held_out(
        scores(3.25, 4.0, 3.75), scores(9.0, 3.5, 7.0), intervals=intervals, groups_N=np.array([0, 1])
    )
    of_means = [*in_groups["offset_0"].values(), *in_groups["differences"].values(), in_groups["control_offset_0"]]
    assert [one["num_groups"] for one in of_means] == [2] * 9


def test_samples_are_spread_evenly() -> None:
    assert spread_indices(4, of=10).tolist() == [0, 2, 5, 7]
    assert spread_indices(10, of=3).tolist() == [0, 1, 2]


def test_a_committed_part_is_not_made_again(tmp_path: Path) -> None:
    stages = Stages(open_storage(str(tmp_path)))
    made: list[slice] = []

    def make(batch: slice) -> dict[str, np.ndarray]:
        made.append(batch)
        return {"numbers": np.arange(batch.start, batch.stop)}

    for _ in range(2):
        batches = stages.batches("set", num_samples=5, batch_size=2, make=make)
        assert joined(batches)["numbers"].tolist() == [0, 1, 2, 3, 4]
    assert made == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    stages = Stages(open_storage(str(tmp_path)))
    stages.check_inputs({"weights": "aa", "tokenizer": "bb"})
    stages.check_inputs({"weights": "aa", "tokenizer": "bb"})
    with pytest.raises(ArtifactError, match=r"these have: weights \(then 'aa', now 'cc'\); set another run_dir"):
        stages.check_inputs({"weights": "cc", "tokenizer": "bb"})


def test_parts_of_another_version_of_the_program_are_refused(tmp_path: Path) -> None:
    stages = Stages(open_storage(str(tmp_path)))
    stages.check_inputs({"weights": "aa"})
    inputs = tmp_path / "stages" / "inputs.json"
    inputs.write_text(inputs.read_text().replace('"stages version": 2', '"stages version": 1'))
    with pytest.raises(ArtifactError, match=r"these have: stages version \(then 1, now 2\); set another run_dir"):
        stages.check_inputs({"weights": "aa"})


def test_a_damaged_part_is_named_and_made_anew_once_it_is_removed(tmp_path: Path) -> None:
    stages = Stages(open_storage(str(tmp_path)))
    made = {"numbers": np.arange(100)}
    stages.arrays("set/00000", lambda: made)
    stages.json("measure", lambda: {"value": 1.5})
    torn = {"set/00000.npz": 300, "measure.json": 5}
    for name, size in torn.items():
        path = tmp_path / "stages" / name
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"stages/set/00000\.npz: it must be a whole part .*; remove it"):
        stages.arrays("set/00000", lambda: made)
    with pytest.raises(ArtifactError, match=r"stages/measure\.json: it must be a whole part .*; remove it"):
        stages.json("measure", lambda: {"value": 1.5})
    for name in torn:
        (tmp_path / "stages" / name).unlink()
    assert stages.arrays("set/00000", lambda: made)["numbers"].tolist() == list(range(100))
    assert stages.json("measure", lambda: {"value": 1.5}) == {"value": 1.5}


def test_damaged_features_in_the_cache_are_named(tmp_path: Path) -> None:
    features = Features(
        name="mean", dim=3, digest="aa", device=torch.device("cpu"), forward=lambda images: images.float().mean((2, 3))
    )
    reader = FeatureReader(features, cache_dir=str(tmp_path))
    images = np.full((2, 4, 4, 3), 7, dtype=np.uint8)
    assert reader.extract(images).tolist() == [[7.0, 7.0, 7.0]] * 2
    (cached,) = tmp_path.glob("*/*.npy")
    cached.write_bytes(cached.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=rf"{cached.name}: it must be a whole array of features, .*; remove it"):
        reader.extract(images)


def _directions(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_a_mirror_twin_does_not_set_the_threshold_of_repeated_images() -> None:
    # Three training images 60 degrees apart; the second view of each lies one degree from the first.
    training_NF = _directions(0, 1, 60, 61, 120, 121)
    empty, labels = np.empty((2, 0), dtype=np.int32), np.zeros(2, dtype=np.int64)
    samples = SampleSet(
        labels_N=labels,
        codes_NT=empty,
        drafts_NTK=empty[:, :, None],
        features_NF=_directions(240, 45),
        calls_per_image=1.0,
        seconds_per_image=0.0,
    )
    half = Half(
        labels_N=labels, captions_N=np.array(["", ""]), real_NF=_directions(0, 0), decoded_NF=_directions(90, 290)
    )
    reference = Reference(tuning=half, report=half, num_rejected=0)
    found = find_memorised(samples, reference, training_NF, num_views=2, num_nearest=1)
    assert found.summary["threshold"] == pytest.approx(0.5)  # 1 - cos 60
    # 45 is 15 from 60, and 90 is 29 from 61; 240 and 290 are 119 and 70 from what is nearest to them.
    assert [found.summary[of]["count"] for of in ("samples", "decoded")] == [1, 1]
    assert (found.sample_indices_N.tolist(), found.training_indices_N.tolist()) == ([1], [2])
    assert found.distances_N == pytest.approx([1 - np.cos(np.deg2rad(15))])
