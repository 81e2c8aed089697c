"""The `sample` job: weights and labels in, pictures and the way to them out.

`samples.json` is committed last: with it the run is finished, and a rerun does nothing; without it, a rerun begins anew
and writes the same pictures. Weights are refused whose codes came from another tokenizer.

B batch, N samples, T positions, K window_size, V views; H, W, C height, width, channels.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.fingerprint import Fingerprint
from tokenization.messages import reason_of
from tokenization.tokenizer import Tokenizer
from training.config import SAMPLE_FREE_FIELDS, SampleConfig
from training.ops import check_ops
from training.sampling import SampledCodes, sample_codes
from training.weights import ModelFile, digest_of, find_weights, load_model

logger = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]

RESULT = "samples.json"
RESULT_VERSION = 1
GAP_PX = 2
GAP_VALUE = 255
NUM_WRITING_THREADS = 8


def run_sample(config: SampleConfig, *, progress: Callable[[int, int], None] | None = None) -> str:
    """The path or URL of the run directory, with grid.png, images/, codes.npy, samples.npz, strip.png, samples.json.

    Args:
        config: the job.
        progress: called with (finished, all) samples after each batch.

    Raises:
        ArtifactError: the weights or the tokenizer cannot be read or do not belong together, or the directory holds
            samples of another spec.
        ValueError: a label is not one of the model's classes, or the stride is larger than its window_size.
        NativeOpError: the spec asks for the native ops, and there are none.
    """
    storage = open_storage(config.run_dir, s3=config.s3)
    if is_finished(storage, config=config):
        logger.info("sample run_dir=%s is finished; nothing to do", storage)
        return storage.url
    with storage.exclusive():
        storage.remove_staged()
        _sample_into(storage, config=config, progress=progress)
    return storage.url


def is_finished(storage: Storage, *, config: SampleConfig) -> bool:
    """Whether the run directory already holds the samples of this spec and these weights.

    Samples outlive weights that are removed, with a warning.

    Raises:
        ArtifactError: it holds samples of another spec, or the weights have changed since (a run that trained on).
    """
    if storage.find(RESULT) is None:
        return False
    try:
        result = json.loads(storage.read_bytes(RESULT))
        spec, weights = SampleConfig.model_validate(result["spec"]), result["weights"]
        sha256, step = str(weights["sha256"]), int(weights["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"read {storage.url_of(RESULT)}: it must be the JSON of a finished run, got {reason_of(error)}; remove it "
            "to sample again"
        ) from error
    before, now = spec.model_dump(mode="json"), config.model_dump(mode="json")  # fields since then: their defaults
    free = ("run_dir", *SAMPLE_FREE_FIELDS)
    differing = [name for name in now if name not in free and before[name] != now[name]]
    if not differing and not _has_weights(config, sha256=sha256):
        differing = [f"content of weights (then of step {step})"]
    if differing:
        raise ArtifactError(
            f"sample into {storage}: the directory must be free or of the same spec, got another "
            f"{', '.join(differing)}; use another run_dir"
        )
    return True


def _has_weights(config: SampleConfig, *, sha256: str) -> bool:
    """Whether the weights are still the same, or gone."""
    try:
        return digest_of(find_weights(config.weights, s3=config.s3)) == sha256
    except ArtifactError as error:
        logger.warning("sample run_dir=%s keeps its samples; its weights cannot be compared: %s", config.run_dir, error)
        return True


def _sample_into(storage: Storage, *, config: SampleConfig, progress: Callable[[int, int], None] | None) -> None:
    device = pick_device(config.device)
    model, model_file = load_model(
        config.weights, device=device, dtype=getattr(torch, config.dtype), use_ema=config.use_ema, s3=config.s3
    )
    tokenizer = Tokenizer.load(config.tokenizer, device=str(device))
    check_tokenizer(model_file, tokenizer)
    _check_labels(config, model_file)
    if config.ops == "native":
        check_ops(with_cuda=False)  # on a GPU, these ops are made of torch's own kernels
        model.use_native_ops()
    began = time.perf_counter()

    def report(num_done: int) -> None:
        logger.info("sample done=%d of=%d elapsed_s=%.1f", num_done, config.num_samples, time.perf_counter() - began)
        if progress is not None:
            progress(num_done, config.num_samples)

    sampled = sample_codes(
        model,
        torch.tensor(config.labels).repeat_interleave(config.num_per_label),
        config=config.sampler,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=report,
    )
    sampling_s = time.perf_counter() - began
    images_NHWC = tokenizer.decode(sampled.codes_NT.numpy().astype(np.int32))
    decoding_s = time.perf_counter() - began - sampling_s
    _write_images(storage, sampled, images_NHWC, num_columns=config.num_per_label)
    strip = _write_strip(storage, sampled, tokenizer, num_images=config.num_strip_images)
    result = _describe(config, model_file, tokenizer.fingerprint, sampled) | strip
    times = {"sampling_s": sampling_s, "decoding_s": decoding_s, "images_per_s": config.num_samples / sampling_s}
    storage.write_json(RESULT, result | {key: round(value, 4) for key, value in times.items()})


def pick_device(name: str) -> torch.device:
    """The device that a spec names; `auto` is cuda where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    num_gpus = torch.cuda.device_count()
    names = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{index}" for index in range(num_gpus))]
    if name not in ["auto", *names]:
        raise ValueError(
            f"pick the device: device must be one of auto, {', '.join(names)} on this machine, "
            f"got {name!r}; set device: auto"
        )
    return torch.device(("cuda" if num_gpus else "cpu") if name == "auto" else name)


def check_tokenizer(model_file: ModelFile, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer other than the one whose codes the model learned.

    Raises:
        ArtifactError: weights, network, codebook or number of codes differ.
    """
    doing, config, theirs = f"sample from {model_file.path}", model_file.config, tokenizer.fingerprint
    expected: dict[str, object] = {
        "codebook_size": config.codebook_size,
        "codes_per_image": config.num_positions,
    }
    found: dict[str, object] = {
        "codebook_size": tokenizer.codebook_size,
        "codes_per_image": tokenizer.codes_per_image,
    }
    if model_file.fingerprint is None:
        logger.warning("%s: the file names no tokenizer; its codes are decoded as the spec says", doing)
    else:
        for name in ("weights_sha256", "network"):
            expected[name], found[name] = getattr(model_file.fingerprint, name), getattr(theirs, name)
    for name, value in expected.items():
        if found[name] != value:
            raise ArtifactError(
                f"{doing}: tokenizer {name} must be that of training, {value}, got {found[name]}; "
                "set tokenizer to the one that the training shards were made with"
            )


def tile_images(images_NHWC: Images, *, num_columns: int) -> Images:
    """One picture (H', W', C) of images in reading order, `num_columns` a line, with white gaps of 2 px between."""
    num_images, height, width, channels = images_NHWC.shape
    num_lines = -(-num_images // num_columns)
    step_y, step_x = height + GAP_PX, width + GAP_PX
    shape = (num_lines * step_y - GAP_PX, num_columns * step_x - GAP_PX, channels)
    tiled = np.full(shape, GAP_VALUE, dtype=np.uint8)
    for index, image_HWC in enumerate(images_NHWC):
        top, left = index // num_columns * step_y, index % num_columns * step_x
        tiled[top : top + height, left : left + width] = image_HWC
    return tiled


def decode_refinements(sampled: SampledCodes, tokenizer: Tokenizer, *, sample_indices: list[int]) -> Images:
    """Images (N, K, H, W, C) of the chosen samples: the codes of each refinement decoded, first drafts to finals."""
    chosen_NKT = sampled.drafts_NTK[sample_indices].transpose(1, 2)
    images: Images = tokenizer.decode(chosen_NKT.flatten(0, 1).numpy().astype(np.int32))
    return images.reshape(*chosen_NKT.shape[:2], *images.shape[1:])


def _check_labels(config: SampleConfig, model_file: ModelFile) -> None:
    num_classes = model_file.config.num_classes
    wrong = [label for label in config.labels if label >= num_classes]
    if wrong:
        raise ValueError(
            f"sample from {model_file.path}: labels must be in [0, {num_classes - 1}], got {wrong}; mend labels"
        )


def _write_images(storage: Storage, sampled: SampledCodes, images_NHWC: Images, *, num_columns: int) -> None:
    for name in storage.list("images/"):  # of a run of more samples that was killed before its samples.json
        storage.remove(name)
    names = [f"images/{index:05d}.png" for index in range(len(images_NHWC))]
    with ThreadPoolExecutor(NUM_WRITING_THREADS) as threads:  # a request each, where they go to S3
        list(threads.map(lambda name, image_HWC: _write_png(storage, name, image_HWC), names, images_NHWC))
    _write_png(storage, "grid.png", tile_images(images_NHWC, num_columns=num_columns))
    with storage.stage("codes.npy") as staged_path, staged_path.open("wb") as file:
        np.save(file, sampled.codes_NT.numpy().astype(np.int32))
    with storage.stage("samples.npz") as staged_path, staged_path.open("wb") as file:
        np.savez(file, arr_0=images_NHWC)


def _write_png(storage: Storage, name: str, image_HWC: Images) -> None:
    png = io.BytesIO()
    Image.fromarray(image_HWC).save(png, format="PNG")
    storage.write_bytes(name, png.getvalue())


def _write_strip(storage: Storage, sampled: SampledCodes, tokenizer: Tokenizer, *, num_images: int) -> dict[str, Any]:
    num_samples, _, window_size = sampled.drafts_NTK.shape
    if window_size == 1 or num_images == 0:
        storage.remove("strip.png")  # of a run that was killed before its samples.json
        reason = "window_size is 1: nothing is refined" if window_size == 1 else "num_strip_images is 0"
        return {"strip": None, "strip_reason": reason}
    count = min(num_images, num_samples)
    sample_indices = [index * num_samples // count for index in range(count)]
    images_NKHWC = decode_refinements(sampled, tokenizer, sample_indices=sample_indices)
    tiled = tile_images(images_NKHWC.reshape(-1, *images_NKHWC.shape[2:]), num_columns=window_size)
    _write_png(storage, "strip.png", tiled)
    return {"strip": "strip.png", "strip_sample_indices": sample_indices}


def _describe(
    config: SampleConfig, model_file: ModelFile, fingerprint: Fingerprint, sampled: SampledCodes
) -> dict[str, Any]:
    return {
        "version": RESULT_VERSION,
        "spec": config.model_dump(mode="json"),
        "weights": {
            "path": model_file.path,
            "sha256": model_file.sha256,
            "step": model_file.step,
            "window_size": model_file.config.window_size,
        },
        "tokenizer_fingerprint": fingerprint.digest,
        "num_samples": config.num_samples,
        "labels": list(np.repeat(config.labels, config.num_per_label).tolist()),
        "seed": config.seed,
        "draft_policy": config.sampler.draft_policy,
        "windows_per_call": config.sampler.windows_per_call,
        "stride": config.sampler.stride,
        "flip_rate": sampled.flip_rate,
        "num_backbone_calls": sampled.num_backbone_calls,
        "calls_per_image": round(sampled.calls_per_sample_N.double().mean().item(), 4),
        "calls_of_image": sampled.calls_per_sample_N.tolist(),
    }
