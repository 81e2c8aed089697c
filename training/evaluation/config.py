"""What an `evaluate` job is, as validated values.

Light: imports no torch, ray or deepspeed. Everything here is [ours]; the measures' own sources stand with them.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.config import S3Config, Seed, SourceConfig
from tokenization.config import Config, Place, TokenizerConfig
from training.config import DraftPolicy, DType, NoiseConfig, SamplerConfig

MIN_HALF = 4
"""Images that a half of the reference must hold: precision looks at third neighbours, intervals at halves."""


FREE_FIELDS = ("device", "features.cache_dir", "ops", "s3")
"""Fields that a rerun in the same directory may change."""


class ControlConfig(Config):
    """The model that the evaluated one is held against: the same base, trained on for as many steps without windows."""

    weights: Place
    """A training run (its newest whole checkpoint; may be an `s3://` URL) or a `.safetensors` of ours."""
    use_ema: bool = False
    """Whether to take the run's moving average of the weights."""
    sampler: SamplerConfig | None = None
    """How its pictures beside the model's are drawn; none is as the model's own, without what that says of
    drafts where the control has none. Measures of its samples need a job of its own."""


class HeldOutConfig(Config):
    """Codes that the model has not seen, and how many of them are scored."""

    shards: Place
    """Directory or s3:// URL of a held-out shard set."""
    num_samples: PositiveInt = 1024
    """Samples scored, spread evenly over the set; all where it has fewer."""
    group_field: str | None = None
    """Field of the source's JSON that says which samples belong together, such as the concept they show: intervals are
    then made by drawing groups. None takes all samples as independent of each other."""
    group_separator: str | None = None
    """Only what stands before it in the group counts."""

    @model_validator(mode="after")
    def _check_separator_has_a_field(self) -> HeldOutConfig:
        if self.group_separator is not None and self.group_field is None:
            raise ValueError(
                f"held_out.group_separator must come with group_field, got {self.group_separator!r} alone; name the "
                f"field, or remove it"
            )
        return self


class ReferenceConfig(Config):
    """The real images that samples are compared with, in two halves: one to tune by, one to report against."""

    source: SourceConfig
    """A corpus as in a tokenize spec; images are cropped as the tokenizer's are."""
    report_source: SourceConfig | None = None
    """The report half, as a corpus of its own such as images of concepts that no model has seen; `source` is then all
    to tune by. None takes both halves from `source`."""
    num_images: Annotated[int, Field(ge=2 * MIN_HALF)] = 10_000
    """Images taken of a corpus, those whose names hash lowest; all where there are fewer."""
    group_field: str | None = None
    """Field of a sample's JSON that says which images belong together, such as the concept they show, so that a group
    is never in both halves; none is the sample's own name. Two corpora are held to it where a field is named."""
    group_separator: str | None = None
    """Only what stands before it in the group counts: `-` puts `1f600-noto` and `1f600-fluent` together."""


class TrainingSetConfig(Config):
    """Where memorised samples are looked for: the codes that the model was trained on."""

    shards: Place
    """Directory or s3:// URL of the training shard set; its codes are decoded."""
    num_samples: Annotated[int, Field(ge=2)] | None = None
    """Samples looked at, spread evenly over the set, two or more; none is all. Each is compared with all others, so
    the time grows with the square."""
    num_views: PositiveInt = 1
    """Views of each that are looked at, from the first on; more than the set has is all."""


class FeaturesConfig(Config):
    """The network whose features stand for an image: one that the tokenizer was not trained with."""

    network: Literal["efficientnet-lite0", "inception-v3"] = "efficientnet-lite0"
    """`efficientnet-lite0` (the extra `evaluate`), or `inception-v3`, that of published FIDs (torch-fidelity's)."""
    weights: Place | None = None
    """File of its weights; none is the one that the package brings, which only `efficientnet-lite0` has."""
    cache_dir: Place | None = None
    """Local directory where features of real images are kept by their content, for all jobs that name it; none."""

    @model_validator(mode="after")
    def _check_cache_is_local(self) -> FeaturesConfig:
        if self.cache_dir is not None and "://" in self.cache_dir:
            raise ValueError(
                f"features.cache_dir must be a local directory, got {self.cache_dir!r}; name one, or remove it"
            )
        return self


TUNABLE = ("temperature", "top_k", "top_p", "guidance", "draft_temperature", "draft_policy")
"""Fields of the sampler that a tuning may try."""


class TuningConfig(Config):
    """Values of the sampler to try; every combination is judged by Frechet distance to the tuning half."""

    temperature: tuple[NonNegativeFloat, ...] = ()
    """None tried: the sampler's own, here and below."""
    top_k: tuple[NonNegativeInt, ...] = ()
    top_p: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = ()
    guidance: tuple[NonNegativeFloat, ...] = ()
    draft_temperature: tuple[PositiveFloat, ...] = ()
    draft_policy: tuple[DraftPolicy, ...] = ()
    num_samples: Annotated[int, Field(ge=MIN_HALF)] = 500
    """Samples drawn for each combination; the same labels and seeds for all."""
    against: Literal["real", "decoded"] = "real"
    """The images of the tuning half, or what their codes decode to: where a tokenizer blurs, the first rewards samplers
    that make up for it, the second leaves it out."""

    @model_validator(mode="after")
    def _check_something_is_tried(self) -> TuningConfig:
        if not self.tried:
            raise ValueError(
                f"tuning must name values of at least one of {', '.join(TUNABLE)}, got none; give some or remove tuning"
            )
        return self

    @property
    def tried(self) -> dict[str, tuple[float | str, ...]]:
        """The fields of the sampler that vary, each with its values."""
        return {name: getattr(self, name) for name in TUNABLE if getattr(self, name)}

    def samplers(self, sampler: SamplerConfig) -> list[SamplerConfig]:
        """Every combination laid over `sampler`, the last field varying fastest."""
        names = list(self.tried)
        return [
            SamplerConfig.model_validate(sampler.model_dump() | dict(zip(names, values, strict=True)))
            for values in product(*self.tried.values())
        ]


class CaptionsConfig(Config):
    """The caption score: is the caption of a sample's class near to what its features say? (the extra `captions`)

    A linear map from features to embeddings of captions is fitted on the tuning half, whose captions the corpus gives.
    """

    of_classes: Place | None = None
    """Text file or s3:// URL with the caption of a class a line, in label order; none is the class names of the
    held-out shard set, which must be words then (`folded-hands`, not `n01440764`)."""
    penalty: PositiveFloat = 0.1
    """Ridge penalty of the map, in units of the features' mean variance."""


class BootstrapConfig(Config):
    """How intervals are made: the measure over and over, on other draws of the same images."""

    num_resamples: Annotated[int, Field(ge=2)] = 100
    """Times a measure is taken again; intervals hold the middle 95 %."""
    min_per_class: Annotated[int, Field(ge=MIN_HALF)] = 10
    """Samples, and real images of the report half, that a class must have for measures of its own."""


class ShownConfig(Config):
    """What the report shows."""

    num_labels: NonNegativeInt = 8
    """Classes of the grids, the most frequent ones of the reference."""
    num_per_label: PositiveInt = 6
    """Pictures of each."""
    num_strips: NonNegativeInt = 8
    """Samples whose refinements are decoded."""
    num_nearest: NonNegativeInt = 12
    """Samples nearest to a training image, shown beside it."""


class EvaluateConfig(Config):
    """`kind: evaluate`: a model in, what it is worth out, beside a control and beside real images."""

    kind: Literal["evaluate"]
    run_dir: Place
    """Directory or s3:// URL of the results: evaluation.json, report.html, samples.npz, pictures.npz, stages/."""
    weights: Place
    """A training run (its newest whole checkpoint; may be an `s3://` URL) or a `.safetensors` of ours."""
    use_ema: bool = False
    """Whether to take the run's moving average of the weights."""
    control: ControlConfig | None = None
    tokenizer: TokenizerConfig
    held_out: HeldOutConfig
    noise: NoiseConfig = NoiseConfig()
    """Noise of the held-out windows: schedule, end_point and coupling. The same for all models that are compared,
    however each was trained."""
    reference: ReferenceConfig
    training_set: TrainingSetConfig | None = None
    """None: memorised samples are not looked for."""
    sampler: SamplerConfig = SamplerConfig()
    """How samples are drawn; `tuning` lays its winner over it."""
    tuning: TuningConfig | None = None
    captions: CaptionsConfig | None = None
    """None: no caption score."""
    num_samples: Annotated[int, Field(ge=MIN_HALF)] = 1000
    """Samples measured, their labels in proportion to those of the corpus that they are compared with. As many as a
    half of the reference holds make the distances comparable with their floors."""
    features: FeaturesConfig = FeaturesConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    shown: ShownConfig = ShownConfig()
    batch_size: PositiveInt = 64
    """Samples drawn, scored and committed together."""
    dtype: DType = "float32"
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:0` or `auto` (cuda where there is one)."""
    ops: Literal["native", "reference"] = "native"
    """Draws and windows by compiled ops (`tensorar build-ops`), or as plain torch: the same draws, more slowly."""
    seed: Seed = 0
    """Seed of all draws: noise, own drafts, samples, resamples."""
    s3: S3Config = S3Config()
