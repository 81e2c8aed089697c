"""An evaluation of seconds over a toy corpus: its inputs, its spec, and what of its result no run may change."""

from pathlib import Path
from typing import Any

import torch
from toy_corpus import sample_members, tokenize_config, tokenize_here, write_tar, write_tiny_tokenizer

from pipeline.storage import open_storage
from tokenization.tokenizer import Tokenizer
from training.config import ModelConfig
from training.evaluation.config import EvaluateConfig
from training.evaluation.evaluate import read_evaluation
from training.tensorar import build_model
from training.weights import save_model

NUM_SAMPLES = 14


def write_model(path: Path, *, tokenizer: Any, window_size: int, seed: int = 5) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig(
        num_layers=1,
        num_heads=2,
        model_dim=16,
        codebook_size=64,
        codes_per_side=4,
        num_classes=3,
        window_size=window_size,
    )
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    save_model(path, model.state_dict(), config=config, fingerprint=tokenizer.fingerprint, step=7)
    return path


def write_inputs(root: Path) -> EvaluateConfig:
    """Toy tars, a random tokenizer, the codes of one tar as training and of one as held-out set, and two models."""
    for tar in range(2):
        numbers = range(12 * tar, 12 * tar + 12)
        members = [member for number in numbers for member in sample_members(number, concept=f"toy{number // 2}")]
        write_tar(root / f"tars/{tar}.tar", members)
    weights = write_tiny_tokenizer(root / "tokenizer.safetensors")
    for tar, name in enumerate(("training", "held-out")):
        source = {"kind": "webdataset", "urls": [f"{root}/tars/{tar}.tar"]}
        job = tokenize_config(root / name, source=source, weights=weights, views={"kind": "flip"})
        tokenize_here(job)
    tokenizer = Tokenizer.load(job.tokenizer)
    model = write_model(root / "model.safetensors", tokenizer=tokenizer, window_size=3)
    control = write_model(root / "control.safetensors", tokenizer=tokenizer, window_size=1, seed=6)
    return EvaluateConfig.model_validate(
        {
            "kind": "evaluate",
            "run_dir": str(root / "evaluation"),
            "weights": str(model),
            "control": {"weights": str(control)},
            "tokenizer": job.tokenizer.model_dump(),
            "held_out": {"shards": str(root / "held-out"), "num_samples": 10, "group_field": "concept"},
            "reference": {"source": {"kind": "webdataset", "urls": [f"{root}/tars/*.tar"]}, "num_images": 24},
            "training_set": {"shards": str(root / "training"), "num_views": 2},
            "sampler": {"draft_policy": "coupled"},
            "tuning": {"guidance": [1.0, 3.0], "num_samples": 6},
            "num_samples": NUM_SAMPLES,
            "bootstrap": {"num_resamples": 4, "min_per_class": 4},
            "shown": {"num_labels": 2, "num_per_label": 3, "num_strips": 3, "num_nearest": 4},
            "features": {"cache_dir": str(root / "cache")},
            "batch_size": 16,
            "device": "cpu",
            "seed": 9,
        }
    )


def result_of(config: EvaluateConfig) -> dict[str, Any]:
    """The result without what may differ from run to run."""
    result = read_evaluation(open_storage(config.run_dir))
    del result["times"], result["headline"]["seconds_per_image"]
    del result["spec"]["run_dir"]
    return result
