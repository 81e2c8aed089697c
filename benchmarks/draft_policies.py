"""Pictures under each draft policy against the control's, by blocks of samples that show their own scatter; JSON lines.

    python benchmarks/draft_policies.py --spec jobs/specs/study_evaluation.yaml \
        --control runs/study/recipes/recipe=control,seed=0 --weights runs/study/recipes/recipe=tuned,seed=0 \
        --tars 'data/open-emoji/tars/validation/*.tar'

A line holds the kernel distance and the Frechet distance of a block to the images of `--tars` (better: of concepts
that no model saw), encoded and decoded, with their labels' proportions; blocks have draws of their own, the same for
all models and policies. The tokenizer and the feature network are the spec's. The last lines hold means over blocks,
and the differences to the control.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from jobs.grid import Study, load_job
from pipeline.config import S3Config
from tokenization.tokenizer import Tokenizer
from training.config import SamplerConfig
from training.evaluation.config import EvaluateConfig, ReferenceConfig
from training.evaluation.distances import frechet_distance, kernel_distance
from training.evaluation.features import Features, load_features
from training.evaluation.image_features import FloatFeatures
from training.evaluation.real_images import choose_images, crop_images
from training.evaluation.samples import proportional_labels, without_drafts
from training.sampling import sample_codes
from training.tensorar import TensorAR
from training.weights import load_model

BATCH = 250
FIRST_SEED = 100


class Judge:
    """The images that samples are compared with, and what turns codes into features."""

    def __init__(self, config: EvaluateConfig, *, tars: str, device: str) -> None:
        self.device = device
        self.tokenizer = Tokenizer.load(config.tokenizer, device=device)
        self.features: Features = load_features(config.features.network, device=device, weights=config.features.weights)
        source = config.reference.source.model_dump() | {"urls": [tars]}
        images = choose_images(ReferenceConfig.model_validate({"source": source}), s3=S3Config())
        pixels_NHWC, places = crop_images(images, image_size_px=self.tokenizer.config.image_size_px)
        self.labels_N = np.sort(np.array([images[place].label for place in places], dtype=np.int64))
        decoded_NHWC = self.tokenizer.decode(self.tokenizer.encode(pixels_NHWC))
        self.wanted_NF = self.features.extract(decoded_NHWC).astype(np.float64)

    def draw(self, model: TensorAR, sampler: SamplerConfig, *, seed: int, num_samples: int) -> FloatFeatures:
        """Features (N, F) of the pictures of one block."""
        labels_N = torch.from_numpy(proportional_labels(self.labels_N, num_samples=num_samples)).to(self.device)
        codes = sample_codes(model, labels_N, config=sampler, seed=seed, batch_size=BATCH).codes_NT.cpu().numpy()
        batches = [codes[start : start + BATCH].astype(np.int32) for start in range(0, num_samples, BATCH)]
        return np.concatenate([self.features.extract(self.tokenizer.decode(batch)) for batch in batches])


def lines(arguments: argparse.Namespace, judge: Judge) -> Iterator[dict[str, object]]:
    """A line a block, then the means."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for weights in (arguments.control, *arguments.weights):
        model, file = load_model(weights, device=judge.device)
        model.use_native_ops()
        for policy in arguments.policies if file.config.window_size > 1 else ("none",):
            fields = {"guidance": arguments.guidance, "temperature": arguments.temperature}
            plain = SamplerConfig.model_validate(fields)
            sampler = without_drafts(plain) if policy == "none" else plain.model_copy(update={"draft_policy": policy})
            row = f"{Path(weights).name} {policy}"
            for block in range(arguments.blocks):
                began = time.monotonic()
                drawn_NF = judge.draw(model, sampler, seed=FIRST_SEED + block, num_samples=arguments.num_samples)
                pair = (drawn_NF.astype(np.float64), judge.wanted_NF)
                found = (kernel_distance(*pair) * 1000, frechet_distance(*pair))
                rows.setdefault(row, []).append(found)
                yield {"row": row, "block": block, "kid_e3": found[0], "fd": found[1], "s": time.monotonic() - began}
    control = next(iter(rows.values()))
    for row, found_B in rows.items():
        for index, name in enumerate(("kid_e3", "fd")):
            gaps = [mine[index] - its[index] for mine, its in zip(found_B, control, strict=True)]
            mean = statistics.mean(mine[index] for mine in found_B)
            spread = statistics.stdev(gaps) if len(gaps) > 1 else None
            yield {"row": row, "mean of": name, "mean": mean, "to control": statistics.mean(gaps), "its sd": spread}


def main() -> None:
    """Parse the command line and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help="an evaluate spec: tokenizer, features, how tars are read")
    parser.add_argument("--control", required=True, help="a run, or weights of ours")
    parser.add_argument("--weights", required=True, nargs="+", help="runs, or weights of ours, to compare with it")
    parser.add_argument("--tars", required=True, help="real images")
    parser.add_argument("--policies", nargs="+", default=["sampled", "argmax", "coupled"])
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--num-samples", type=int, default=2000, help="of a block")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    job = load_job(arguments.spec, [])
    config = job.runs[0].spec if isinstance(job, Study) else job
    if not isinstance(config, EvaluateConfig):
        parser.error(f"--spec must be an evaluate spec, got kind {config.kind}")
    judge = Judge(config, tars=arguments.tars, device=arguments.device)
    for line in lines(arguments, judge):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
