"""The `evaluate` job: weights and real images in, `evaluation.json` out; in stages, each committed once it is made.

Invariant: the results depend on the weights, the corpora and the spec alone, so a job that is killed at any moment and
run again ends in the same `evaluation.json`, its `times` aside. It is committed last: with it the job is finished, and
a rerun does nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.philox import Int64Array
from pipeline.storage import ArtifactError, Storage, open_storage
from training.config import SamplerConfig
from training.evaluation.captions import embed_captions
from training.evaluation.config import MIN_HALF, EvaluateConfig
from training.evaluation.draft_shift import summarise_held_out
from training.evaluation.flips import flip_rates
from training.evaluation.grouping import held_out_groups
from training.evaluation.headline import headline_of
from training.evaluation.held_out import score_held_out, spread_indices
from training.evaluation.image_features import Half, Reference, reference_features
from training.evaluation.inputs import Inputs, LoadedModel, binding_fields, digests_of_weights, load_inputs
from training.evaluation.intervals import Intervals
from training.evaluation.measures import (
    DISTANCES,
    caption_score,
    compared_sets,
    distance_of_class,
    distances_of,
    distances_to_decoded,
    label_score,
    manifold_of,
)
from training.evaluation.memorised import Memorised, find_memorised
from training.evaluation.pictures import (
    PICTURES_NAME,
    SAMPLES_NAME,
    ShownSamples,
    choose_shown,
    write_pictures,
    write_samples,
)
from training.evaluation.samples import SamplePlan, SampleSet, draw_samples, proportional_labels, without_drafts
from training.evaluation.stages import Arrays, Stages, joined
from training.evaluation.tuning import tune_sampler

logger = logging.getLogger(__name__)

RESULT = "evaluation.json"
REPORT_NAME = "report.html"
RESULT_VERSION = 1


def run_evaluate(config: EvaluateConfig) -> str:
    """Return the path or URL of `evaluation.json`, made first where it is not there yet.

    Args:
        config: the job.

    Raises:
        ArtifactError: something that it reads is missing, damaged or does not belong to the rest, or the directory
            holds an evaluation of something else.
        ValueError: the device, the feature network or the captions' embedder is not to be had.
    """
    storage = open_storage(config.run_dir, s3=config.s3)
    if is_finished(storage, config=config):
        logger.info("evaluate run_dir=%s is finished; nothing to do", storage)
        return storage.url_of(RESULT)
    with storage.exclusive():
        storage.remove_staged()
        inputs = load_inputs(config)
        stages = Stages(storage)
        stages.check_inputs(inputs.digests, products=(SAMPLES_NAME, PICTURES_NAME, REPORT_NAME))
        storage.write_json(RESULT, _Evaluation(config, inputs=inputs, stages=stages).run())
    return storage.url_of(RESULT)


def is_finished(storage: Storage, *, config: EvaluateConfig) -> bool:
    """Return whether the results are there; they outlive weights that are removed, with a warning.

    Raises:
        ArtifactError: they are of another spec, or of other weights: a run that has trained on.
    """
    if storage.find(RESULT) is None:
        return False
    result = _read_result(storage)
    before = {"weights": result["weights"], "control.weights": result["control"] or {"sha256": None}}
    try:
        digests = digests_of_weights(config)
    except ArtifactError as error:
        logger.warning("evaluate run_dir=%s keeps its results; its weights cannot be compared: %s", storage, error)
        digests = {}
    differing = [name for name, digest in digests.items() if before[name]["sha256"] != digest]
    if differing:
        raise ArtifactError(
            f"evaluate into {storage}: its results must be of the weights that the spec names, got another content of "
            f"{', '.join(differing)}; set another run_dir"
        )
    _check_spec(storage, result["spec"], config=config)
    return True


def _check_spec(storage: Storage, before: dict[str, Any], *, config: EvaluateConfig) -> None:
    old, new = binding_fields(type(config).model_validate(before)), binding_fields(config)
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if differing:
        raise ArtifactError(
            f"evaluate into {storage}: its results must be of this spec, but these fields differ: "
            f"{', '.join(differing)}; set another run_dir"
        )


def read_evaluation(storage: Storage) -> dict[str, Any]:
    """Return the result of a finished evaluation.

    Args:
        storage: the `run_dir` of an evaluate job.

    Raises:
        ArtifactError: there is none, or it is of another version.
    """
    if storage.find(RESULT) is None:
        raise ArtifactError(f"read {storage.url_of(RESULT)}: it must be there; run the evaluate job to its end")
    result = _read_result(storage)
    if result.get("version") != RESULT_VERSION:
        raise ArtifactError(
            f"read {storage.url_of(RESULT)}: version must be {RESULT_VERSION}, got {result.get('version')!r}; "
            "evaluate again into another run_dir"
        )
    return result


def _read_result(storage: Storage) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_bytes(RESULT)))
    except ValueError as error:
        raise ArtifactError(
            f"read {storage.url_of(RESULT)}: it must be the JSON of a finished evaluation, got {error}; remove it and "
            "run the job again, which makes it from its parts"
        ) from error


class _Evaluation:
    """One evaluation under way; each method is a stage or the sum of some."""

    def __init__(self, config: EvaluateConfig, *, inputs: Inputs, stages: Stages) -> None:
        self._config, self._inputs, self._stages = config, inputs, stages
        self._intervals = Intervals(config.bootstrap, seed=config.seed)
        self._num_classes = inputs.model.file.config.num_classes

    def run(self) -> dict[str, Any]:
        """The whole evaluation; returns the result."""
        config, inputs = self._config, self._inputs
        held_out = self._held_out()
        reference = reference_features(
            self._stages, config.reference, tokenizer=inputs.tokenizer, reader=inputs.reader, s3=config.s3
        )
        self._check_captions(reference)
        labels_N = self._labels(reference, reference.report, num_samples=config.num_samples)
        sampler, tried = self._tuned(reference)
        plan = self._plan(labels_N, counters_N=np.arange(len(labels_N), dtype=np.int64))
        samples = self._draw("samples", inputs.model, sampler=sampler, plan=plan)
        shown = choose_shown(labels_N, shown=config.shown)
        control_grid = self._control_grid(plan, shown=shown, sampler=sampler)
        memorised = self._memorised(samples, reference)
        write_samples(self._stages.storage, samples, tokenizer=inputs.tokenizer)
        pictures = write_pictures(
            self._stages.storage,
            samples,
            control_grid,
            shown=shown,
            memorised=memorised,
            tokenizer=inputs.tokenizer,
            training_images=inputs.training_images,
        )
        result = {
            **self._described(),
            "held_out": held_out,
            "reference": {
                "num_tuning": len(reference.tuning.labels_N),
                "num_report": len(reference.report.labels_N),
                "num_rejected": reference.num_rejected,
            },
            "tuning": tried,
            "sampler": sampler.model_dump(mode="json"),
            "num_samples": len(labels_N),
            "measures": self._measures(samples, reference),
            "flips": {"draft_policy": sampler.draft_policy, **flip_rates(samples.drafts_NTK, stride=sampler.stride)},
            "cost": {"backbone_calls_per_image": samples.calls_per_image, "batch_size": config.batch_size},
            "memorised": None if memorised is None else memorised.summary,
            "pictures": pictures,
            "times": {
                "seconds_per_image": samples.seconds_per_image,
                "device": str(inputs.device),
                "num_threads": torch.get_num_threads(),
            },
        }
        return result | {"headline": headline_of(result)}

    def _described(self) -> dict[str, Any]:
        inputs = self._inputs
        features = inputs.reader.features
        return {
            "version": RESULT_VERSION,
            "spec": self._config.model_dump(mode="json"),
            "weights": inputs.model.described(),
            "control": None if inputs.control is None else inputs.control.described(),
            "tokenizer_fingerprint": inputs.tokenizer.fingerprint.digest,
            "features": {"network": features.name, "dim": features.dim, "weights_sha256": features.digest},
            "class_names": inputs.held_out.manifest.class_names,
        }

    def _held_out(self) -> dict[str, Any]:
        config, inputs = self._config, self._inputs
        sample_indices = spread_indices(config.held_out.num_samples, of=inputs.held_out.num_samples)
        groups_N = held_out_groups(config.held_out, inputs.held_out, sample_indices=sample_indices)

        def scores_of(name: str, loaded: LoadedModel) -> Arrays:
            def make(batch: slice) -> Arrays:
                return score_held_out(
                    loaded.model, inputs.held_out, sample_indices[batch], noise=config.noise, seed=config.seed
                )

            batches = self._stages.batches(
                f"held_out/{name}", num_samples=len(sample_indices), batch_size=config.batch_size, make=make
            )
            return joined(batches)

        model = scores_of("model", inputs.model)
        control = None if inputs.control is None else scores_of("control", inputs.control)
        return summarise_held_out(model, control, intervals=self._intervals, groups_N=groups_N)

    def _labels(self, reference: Reference, half: Half, *, num_samples: int) -> Int64Array:
        """Labels of samples, in the proportions of those of the real images of a half's corpus."""
        labels = reference.labels_for(half)
        highest = max(int(either.labels_N.max()) for either in (reference.tuning, reference.report))
        if not len(labels) or highest >= self._num_classes:
            got = f"up to {highest}" if len(labels) else "none"
            raise ArtifactError(
                "evaluate: the reference must have labels below the model's num_classes = "
                f"{self._num_classes}, got {got}; name a corpus with the classes that the model was trained on"
            )
        return proportional_labels(labels, num_samples=num_samples)

    def _check_captions(self, reference: Reference) -> None:
        count = int((reference.tuning.captions_N != "").sum())
        if self._config.captions is not None and count < MIN_HALF:
            raise ArtifactError(
                f"evaluate: at least {MIN_HALF} images of the tuning half must have captions for a caption score, got "
                f"{count} of {len(reference.tuning.captions_N)}; say in reference.source where they are, or remove "
                "captions"
            )

    def _plan(self, labels_N: np.ndarray, *, counters_N: np.ndarray) -> SamplePlan:
        return SamplePlan(
            labels_N=labels_N, counters_N=counters_N, seed=self._config.seed, batch_size=self._config.batch_size
        )

    def _draw(
        self,
        name: str,
        loaded: LoadedModel,
        *,
        sampler: SamplerConfig,
        plan: SamplePlan,
        are_measured: bool = True,
    ) -> SampleSet:
        return draw_samples(
            self._stages,
            name,
            model=loaded.model,
            sampler=sampler,
            plan=plan,
            tokenizer=self._inputs.tokenizer,
            extract=self._inputs.reader.features.extract if are_measured else None,
        )

    def _tuned(self, reference: Reference) -> tuple[SamplerConfig, list[dict[str, Any]] | None]:
        config = self._config
        if config.tuning is None:
            return config.sampler, None
        half = reference.tuning
        labels_N = self._labels(reference, half, num_samples=config.tuning.num_samples)
        # Counters behind those of the reported samples: other draws than theirs.
        plan = self._plan(labels_N, counters_N=config.num_samples + np.arange(len(labels_N), dtype=np.int64))
        return tune_sampler(
            config.tuning,
            sampler=config.sampler,
            draw=lambda name, sampler: self._draw(name, self._inputs.model, sampler=sampler, plan=plan),
            wanted_NF=half.real_NF if config.tuning.against == "real" else half.decoded_NF,
        )

    def _control_grid(self, plan: SamplePlan, *, shown: ShownSamples, sampler: SamplerConfig) -> SampleSet | None:
        control, grid = self._inputs.control, shown.grid
        if control is None or self._config.control is None or not len(grid):
            return None
        shown_plan = self._plan(plan.labels_N[grid], counters_N=plan.counters_N[grid])
        is_windowed = control.file.config.window_size > 1
        own = self._config.control.sampler or (sampler if is_windowed else without_drafts(sampler))
        return self._draw("control_samples", control, sampler=own, plan=shown_plan, are_measured=False)

    def _memorised(self, samples: SampleSet, reference: Reference) -> Memorised | None:
        training_images = self._inputs.training_images
        if training_images is None:
            return None
        return find_memorised(
            samples,
            reference,
            training_images.features(self._stages, reader=self._inputs.reader),
            num_views=training_images.num_views,
            num_nearest=self._config.shown.num_nearest,
        )

    def _measures(self, samples: SampleSet, reference: Reference) -> dict[str, Any]:
        """Each measure is a stage: the intervals of the distances take as long as many a sample."""
        sets, intervals = compared_sets(samples, reference), self._intervals

        def staged(name: str, make: Callable[[], Any]) -> Any:
            return self._stages.json(f"measures/{name}", make)

        found: dict[str, Any] = {}
        for name in DISTANCES:
            made = partial(distances_of, name, sets, reference=reference, intervals=intervals)
            found[name] = staged(name, made)
            to_decoded = partial(distances_to_decoded, name, sets, reference=reference, intervals=intervals)
            found[f"{name}_to_decoded"] = staged(f"{name}_to_decoded", to_decoded)
        found |= staged("manifold", lambda: manifold_of(sets, reference=reference, intervals=intervals))
        found["label_score"] = staged(
            "label_score",
            lambda: label_score(samples, reference, num_classes=self._num_classes, intervals=intervals),
        )
        if self._config.captions is not None:
            found["caption_score"] = staged("caption_score", partial(self._caption_score, samples, reference))
        of_class = partial(distance_of_class, reference=reference, intervals=intervals)
        tuning = reference.tuning
        found["kernel_distance_of_class"] = staged("of_class", partial(of_class, samples.features_NF, samples.labels_N))
        found["kernel_distance_of_class_decoded"] = staged(
            "of_class_decoded", partial(of_class, tuning.decoded_NF, tuning.labels_N)
        )
        return found

    def _caption_score(self, samples: SampleSet, reference: Reference) -> dict[str, Any]:
        config, class_captions = self._config.captions, self._inputs.class_captions
        assert config is not None
        assert class_captions is not None
        return caption_score(
            samples,
            reference,
            embed=partial(embed_captions, device=str(self._inputs.device)),
            class_captions=class_captions,
            penalty=config.penalty,
            intervals=self._intervals,
        )
