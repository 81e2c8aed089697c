"""A study of four sample runs of a tiny model, each of them a moment's work, for tests."""

from pathlib import Path

import torch

from tokenization.config import TokenizerConfig, VQConfig
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork
from tokenization.weights_file import write_weights
from training.config import ModelConfig
from training.tensorar import build_model
from training.weights import save_model

NETWORK = VQConfig(codebook_size=24, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32)
NAMES = ["labels=apple,seed=0", "labels=apple,seed=1", "labels=bear,seed=0", "labels=bear,seed=1"]


def write_tiny_weights(directory: Path) -> Path:
    """Write a model of five classes and its tokenizer; returns `directory`."""
    torch.manual_seed(0)
    path = directory / "tokenizer.safetensors"
    write_weights(path, network=NETWORK, state=dict(VQNetwork(NETWORK).state_dict()), metadata={})
    tokenizer = TokenizerConfig(weights=str(path), image_size_px=6, batch_size=4)
    config = ModelConfig(
        num_layers=1, num_heads=2, model_dim=16, codebook_size=24, codes_per_side=3, num_classes=5, window_size=3
    )
    weights, fingerprint = build_model(config).state_dict(), Tokenizer.load(tokenizer).fingerprint
    save_model(directory / "model.safetensors", weights, config=config, fingerprint=fingerprint, step=7)
    return directory


def write_sample_study(directory: Path, *, weights: Path) -> Path:
    """Write the spec of the study, whose runs lie in `directory/study`; returns its path."""
    path = directory / "study.yaml"
    path.write_text(f"""\
kind: sample
run_dir: {directory}/study
weights: {weights}/model.safetensors
tokenizer: {{weights: {weights}/tokenizer.safetensors, image_size_px: 6, batch_size: 4}}
num_per_label: 2
num_strip_images: 0
device: cpu
grid:
  labels:
    apple: {{labels: [1]}}
    bear: {{labels: [2]}}
  seed: [0, 1]
""")
    return path


def results_of(study: Path) -> dict[str, bytes]:
    """The records of the study's runs that are done, by path."""
    return {str(path): path.read_bytes() for path in sorted(study.glob("*/samples.json"))}
