"""What a model, its noise, its optimiser, a `train` job and a `sample` job are, as validated values.

Light: imports no torch, ray or deepspeed. `[ours]` marks a choice that the paper does not state.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.config import ClusterConfig, LoaderConfig, S3Config, Seed
from tokenization.config import Config, Fraction, Place, TokenizerConfig
from training.recipe import Recipe, with_recipe

SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}
"""LlamaGen's named sizes: (layers, heads, model_dim)."""

DType = Literal["float32", "bfloat16"]

DEFAULT_RECIPE: Recipe = "tuned"
"""The recipe of a train spec that names none."""


class ModelConfig(Config):
    """The base decoder (LlamaGen) and the TensorAR modules around it."""

    size: Literal["B", "L", "XL", "XXL", "3B"] | None = None
    """A named LlamaGen size, or none and the next three fields."""
    num_layers: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    model_dim: PositiveInt | None = None
    codebook_size: PositiveInt = 16384
    """Codes of the tokenizer."""
    codes_per_side: PositiveInt = 16
    """Side of the square grid of codes; T = codes_per_side ** 2."""
    num_classes: PositiveInt = 1000
    """Class labels; one more row of the table is the null label of guidance."""
    window_size: PositiveInt = 1
    """k: codes predicted per step; 1 is the plain base model."""
    module_ffn_ratio: PositiveFloat = 0.125
    """Hidden width of the feed-forward in the TensorAR modules, over model_dim [ours]."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Dropout after embeddings, attention output and feed-forward output."""
    label_dropout: Fraction = 0.1
    """Share of training samples whose label becomes the null label."""

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        given = (self.num_layers, self.num_heads, self.model_dim)
        if self.size is not None and any(value is not None for value in given):
            raise ValueError(f"size {self.size!r} fixes num_layers, num_heads and model_dim; remove them or the size")
        if self.size is None and any(value is None for value in given):
            raise ValueError(f"give size (one of {', '.join(SIZES)}) or all of num_layers, num_heads and model_dim")
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"model_dim must be a multiple of 4 * num_heads = {4 * self.heads} (2-D rotary pairs), got {self.dim}"
            )
        if self.window_size > self.num_positions:
            raise ValueError(f"window_size must be in [1, {self.num_positions}], got {self.window_size}")
        return self

    @property
    def layers(self) -> int:
        """Blocks of the backbone."""
        return self._shape[0]

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self._shape[1]

    @property
    def dim(self) -> int:
        """Width D of the backbone."""
        return self._shape[2]

    @property
    def num_positions(self) -> int:
        """T, the codes of an image."""
        return self.codes_per_side**2

    @property
    def _shape(self) -> tuple[int, int, int]:
        if self.size is not None:
            return SIZES[self.size]
        assert self.num_layers is not None
        assert self.num_heads is not None
        assert self.model_dim is not None
        return self.num_layers, self.num_heads, self.model_dim


class NoiseConfig(Config):
    """Discrete tensor noising of the windows that the model reads in training."""

    schedule: Literal["linear", "sine", "sqrt", "exponential", "none", "full"] = "exponential"
    """beta(j) over the offsets; the paper names four and finds exponential best."""
    end_point: Literal["closed", "open"] = "closed"
    """`closed`: beta of the last offset is 1; `open`: it stays below [ours]."""
    coupling: Literal["independent", "shared"] = "independent"
    """Draws per (position, offset), or one per position shared by the windows that hold it [ours]."""
    own_draft_fraction: Fraction = 0.0
    """Share of global batches whose drafts are sampled from the model itself instead of noised [ours]."""
    draft_temperature: PositiveFloat = 1.0
    """Temperature of own drafts in training. Validation's are drawn at 1, as sampling draws them by default [ours]."""
    beta_jitter: Fraction = 0.0
    """In training, beta of every offset >= 1 is moved by one uniform draw a step from [-jitter, jitter], the same for
    all, and clipped to [0, 1]; 0 is the schedule itself. Validation has none [ours]."""
    draft_weight: NonNegativeFloat = 1.0
    """Loss weight of each offset >= 1, that of offset 0 being 1; 1 weighs all alike. Normalised to sum 1 [ours]."""
    offset_weights: tuple[NonNegativeFloat, ...] | None = None
    """Loss weight of each of the k offsets instead of `draft_weight`. Normalised to sum 1 [ours]."""
    draft_gradient_scale: Fraction = 1.0
    """What the gradients of offsets >= 1 are multiplied by where they enter the base model (backbone, both embeddings,
    final norm, head) and, through its states, the input encoder; the output decoder has all of them. At 0 the base
    learns from offset 0 alone [ours]."""
    scored_stride: PositiveInt = 1
    """In training, offsets >= 1 are scored at every n-th position only, from a random phase on, each counting n times:
    an unbiased estimate of the loss for less work; 1 is exact. Validation is exact always [ours]."""

    def weights_of_offsets(self, window_size: int) -> tuple[float, ...]:
        """Loss weight of each offset, `window_size` values, not normalised."""
        return self.offset_weights or (1.0,) + (self.draft_weight,) * (window_size - 1)


class OptimizerConfig(Config):
    """AdamW and its schedule; the defaults are LlamaGen's."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.05
    """Applied to matrices only."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to `final_learning_rate_fraction` at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    module_warmup_steps: NonNegativeInt = 0
    """Updates from the first on (skipped steps aside) that move the TensorAR modules alone; the base model, its moments
    and its average stay as they are. Needs `warm_start`. Gradients are clipped by the norm of all, the base's too
    [ours]."""
    final_learning_rate_fraction: Fraction = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    """Global norm that gradients are clipped to; 0 turns clipping off."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of the exponential moving average of the weights, kept in float32 beside them; none keeps no average.
    LlamaGen's is 0.9999."""


class EngineConfig(Config):
    """How DeepSpeed holds and computes the model."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 1 partitions the optimiser, 2 the gradients too, 3 the parameters too."""
    dtype: DType = "bfloat16"
    """Arithmetic of forward and backward; the optimiser is float32."""
    global_batch_size: PositiveInt = 256
    """Samples per step over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Samples per rank and micro step; none is the global batch over the world size."""
    offload_optimizer: bool = False
    """Whether float32 weights, Adam's moments and the average live in CPU memory (ZeRO 1 to 3)."""
    activation_checkpointing: bool = False
    """Whether each block's activations are computed again in backward: about a third more time, far less memory."""
    compile_mode: Literal["none", "default", "max-autotune"] = "none"
    """torch.compile of every block (ZeRO 0 to 2); losses then differ in the last bits from those without."""
    ops: Literal["native", "reference"] = "native"
    """TensorAR's own work as compiled ops (`tensorar build-ops`), or as plain torch: the same draws, more slowly."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in 10^12 FLOP/s, for MFU; none measures a matrix product at start."""
    step_timeout_s: PositiveFloat = 600.0
    """Seconds that a phase of a step (data, forward, backward, update, a validation batch, a save) may take; after them
    a rank counts as hung and the run ends, naming it."""

    @model_validator(mode="after")
    def _check_stage(self) -> EngineConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, got 0; set zero_stage: 1 or turn it off")
        if self.compile_mode != "none" and self.zero_stage == 3:
            raise ValueError(
                f"compile_mode must be none at zero_stage 3, whose hooks gather weights inside every block, "
                f"got {self.compile_mode!r}; set zero_stage: 2 or compile_mode: none"
            )
        return self

    def grad_accumulation(self, world_size: int) -> int:
        """Micro steps per step on `world_size` ranks.

        Raises:
            ValueError: the global batch does not divide.
        """
        unit = (self.micro_batch_size or 1) * world_size
        if self.global_batch_size % unit:
            low = self.global_batch_size // unit * unit
            near = " or ".join(str(value) for value in (low, low + unit) if value)
            raise ValueError(
                f"engine.global_batch_size must be a multiple of micro_batch_size * world_size = "
                f"{self.micro_batch_size or 1} * {world_size} = {unit}, got {self.global_batch_size}; use {near}"
            )
        return self.global_batch_size // unit if self.micro_batch_size else 1

    def samples_per_micro_step(self, world_size: int) -> int:
        """Samples of one rank's micro step on `world_size` ranks; raises as `grad_accumulation`."""
        return self.global_batch_size // (world_size * self.grad_accumulation(world_size))


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every_n_steps: PositiveInt = 1000
    keep_latest: PositiveInt = 2
    """Newest whole checkpoints that stay."""
    keep_every_n_steps: PositiveInt | None = None
    """Checkpoints whose step is a multiple of it stay for good; a multiple of `every_n_steps`."""
    background: bool = True
    """Whether training goes on while a checkpoint is written, for a copy of its bytes in memory."""

    @model_validator(mode="after")
    def _check_kept(self) -> CheckpointConfig:
        kept, every = self.keep_every_n_steps, self.every_n_steps
        if kept is not None and kept % every:
            low = kept // every * every
            near = " or ".join(str(value) for value in (low, low + every) if value)
            raise ValueError(
                f"keep_every_n_steps must be a multiple of every_n_steps = {every}, got {kept}; use {near}"
            )
        return self


class ValidationConfig(Config):
    """Held-out measurement during training."""

    shards: Place
    """Directory or s3:// URL of a held-out shard set."""
    every_n_steps: PositiveInt = 500
    num_samples: PositiveInt = 512
    """Samples measured, the same ones every time."""


class TrainConfig(Config):
    """`kind: train`: shards of codes in, a run with checkpoints out."""

    kind: Literal["train"]
    run_dir: Place
    """Directory of this run: checkpoints/, metrics.jsonl, tensorboard/, logs/."""
    data: LoaderConfig
    model: ModelConfig
    recipe: Recipe = DEFAULT_RECIPE
    """`paper`: noise, weights and warm-up as the paper has them, where the next two do not say; `tuned`: own drafts and
    a small weight of offsets >= 1 [ours]. It fills in nothing at window_size 1."""
    noise: NoiseConfig = NoiseConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    num_steps: PositiveInt
    """Optimiser steps of the whole run."""
    log_every_n_steps: PositiveInt = 10
    max_skipped_steps: NonNegativeInt = 10
    """Steps that may be skipped because loss or gradient norm is not finite, over the whole run; one more ends it."""
    wandb_project: str | None = None
    """Weights & Biases project that the metrics go to as well (needs the `wandb` package)."""
    warm_start: Place | None = None
    """Weights to begin from: a run directory, our `.safetensors`, or a LlamaGen checkpoint."""
    seed: Seed = 0
    """Seed of initialisation, noise, dropout and own drafts."""
    s3: S3Config = S3Config()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, data: Any) -> Any:
        return with_recipe(data, default=DEFAULT_RECIPE) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check_parts(self) -> TrainConfig:
        weights = self.noise.offset_weights
        if weights is not None and len(weights) != self.model.window_size:
            raise ValueError(
                f"noise.offset_weights must have model.window_size = {self.model.window_size} values, "
                f"got {len(weights)}"
            )
        if weights is not None and self.noise.draft_weight != 1.0:
            raise ValueError(
                f"noise.draft_weight must not stand beside noise.offset_weights, which say all, "
                f"got {self.noise.draft_weight}; remove one of them"
            )
        if weights is not None and weights[0] == 0:
            raise ValueError(f"noise.offset_weights must weigh offset 0, the code that is kept, got {weights}")
        if self.noise.scored_stride > self.model.num_positions:
            raise ValueError(
                f"noise.scored_stride must be in [1, model.codes_per_side ** 2 = {self.model.num_positions}], "
                f"got {self.noise.scored_stride}"
            )
        if self.cluster.launcher == "ray":
            self.engine.grad_accumulation(self.cluster.num_workers)
        return self

    @model_validator(mode="after")
    def _check_module_warmup(self) -> TrainConfig:
        num_steps = self.optimizer.module_warmup_steps
        if num_steps and self.model.window_size == 1:
            raise ValueError(
                f"optimizer.module_warmup_steps must be 0 at model.window_size 1, where there are no modules, "
                f"got {num_steps}; remove it"
            )
        if num_steps and self.warm_start is None:
            raise ValueError(
                f"optimizer.module_warmup_steps must be 0 without warm_start, since nothing can be learned around "
                f"the zero head of a fresh base model, got {num_steps}; set warm_start or remove it"
            )
        return self


DraftPolicy = Literal["sampled", "coupled", "argmax"]


class SamplerConfig(Config):
    """How codes are drawn from a model."""

    guidance: NonNegativeFloat = 2.0
    """Classifier-free guidance scale; 1 is off."""
    guidance_interval: Annotated[int, Field(ge=-1)] = -1
    """Guide only steps 0..n, counted from the second code as LlamaGen does; -1 is always."""
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_k: NonNegativeInt = 0
    """Codes kept before the draw; 0 is all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Probability mass kept before the draw."""
    draft_policy: DraftPolicy = "sampled"
    """How drafts are chosen: fresh draws, draws kept across refinements, or the most likely code [ours].

    `coupled` flips less and lets `windows_per_call` accept more, at a price: a draft tells about the draw of its own
    final, so a final that follows its draft is no sample of the model's prediction given the window."""
    draft_temperature: PositiveFloat | None = None
    """Temperature of drafts; none is that of finals."""
    draft_top_k: NonNegativeInt | None = None
    """Codes kept before a draft is drawn; none is as for finals."""
    draft_top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Probability mass kept before a draft is drawn; none is as for finals."""
    windows_per_call: PositiveInt = 1
    """L: windows that one backbone call reads on the assumption that drafts stand; those for which that comes out true
    are accepted. The codes are those of 1, in fewer calls, each of them with L times the arithmetic [ours]."""
    stride: PositiveInt = 1
    """s <= window_size: codes that become final in one backbone call, all but the first without having been refined:
    s times fewer calls, other codes [ours]."""

    @model_validator(mode="after")
    def _check_dials(self) -> SamplerConfig:
        if self.stride > 1 and self.windows_per_call > 1:
            raise ValueError(
                f"stride and windows_per_call exclude each other: one of them must be 1, got stride {self.stride} and "
                f"windows_per_call {self.windows_per_call}; use windows_per_call for the same codes in fewer calls, "
                f"stride for a fixed number of calls"
            )
        return self


class SampleConfig(Config):
    """`kind: sample`: weights in, pictures out."""

    kind: Literal["sample"]
    run_dir: Place
    """Directory or s3:// URL of the results: grid.png, images/, codes.npy, samples.npz, strip.png, samples.json."""
    weights: Place
    """A training run (its newest whole checkpoint; may be an `s3://` URL) or a `.safetensors` of ours."""
    use_ema: bool = False
    """Whether to sample from the run's moving average of the weights."""
    tokenizer: TokenizerConfig
    sampler: SamplerConfig = SamplerConfig()
    labels: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Class labels to sample."""
    num_per_label: PositiveInt = 4
    batch_size: PositiveInt = 32
    """Images sampled together; the pictures do not depend on it."""
    dtype: DType = "float32"
    num_strip_images: NonNegativeInt = 4
    """Images shown in the refinement strip."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:0` or `auto` (cuda where there is one)."""
    ops: Literal["native", "reference"] = "native"
    """Draws and windows by compiled ops (`tensorar build-ops`), or as plain torch: the same draws, more slowly."""
    seed: Seed = 0
    """Seed of all draws."""
    s3: S3Config = S3Config()

    @property
    def num_samples(self) -> int:
        """Pictures in all."""
        return len(self.labels) * self.num_per_label


SAMPLE_FREE_FIELDS = ("batch_size", "device", "ops", "s3")
"""Fields of a sample spec that a rerun in the same directory may change: the pictures do not depend on them."""
