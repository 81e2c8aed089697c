"""Toy corpora, a tiny random tokenizer and the tokenize job over them, for tests that need no real pictures."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import TokenizeConfig
from pipeline.ledger import Manifest, write_manifest
from pipeline.resume import check_identity
from pipeline.sidecars import write_sidecars
from pipeline.sources.registry import make_source
from pipeline.storage import open_storage
from pipeline.tally import Tally
from pipeline.tokenize import make_manifest
from pipeline.worker import UnitTokenizer
from tokenization.config import VQConfig
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork
from tokenization.weights_file import write_weights

VOLATILE = (".lock", "preview.html", "status.json")
Members = list[tuple[str, bytes]]


def png(seed: int, *, width: int = 40, height: int = 36) -> bytes:
    """A PNG of smooth colour noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def sample_members(number: int, **fields: Any) -> Members:
    """The image and JSON members of a good sample; label = number % 3."""
    metadata = {"caption": f"thing {number}", "label": number % 3, "group": "toys"} | fields
    return [(f"s{number:04d}.png", png(number)), (f"s{number:04d}.json", json.dumps(metadata).encode())]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_tars(directory: Path, *, num_tars: int = 3, samples_per_tar: int = 10) -> str:
    """Good samples in tars `00000.tar`...; returns the brace pattern."""
    for tar in range(num_tars):
        numbers = range(tar * samples_per_tar, (tar + 1) * samples_per_tar)
        write_tar(directory / f"{tar:05d}.tar", [member for number in numbers for member in sample_members(number)])
    return f"{directory}/{{00000..{num_tars - 1:05d}}}.tar"


def write_folder(root: Path, *, classes: tuple[str, ...] = ("apple", "bear", "car"), images_per_class: int = 5) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(images_per_class):
            (root / name / f"{number}.png").write_bytes(png(100 * label + number))
    return root


def write_tiny_tokenizer(path: Path, *, seed: int = 0) -> Path:
    """Random weights of a network of 64 codes for patches of 4 px: encodes a 16 px image as 16 codes."""
    network = VQConfig(
        codebook_size=64, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32, stem_patch_px=2
    )
    torch.manual_seed(seed)
    write_weights(path, network=network, state=VQNetwork(network).state_dict(), metadata={})
    return path


def tokenize_config(run_dir: Path | str, *, source: dict[str, Any], weights: Path, **fields: Any) -> TokenizeConfig:
    tokenizer = {"weights": str(weights), "image_size_px": 16, "batch_size": 4}
    return TokenizeConfig.model_validate(
        {"kind": "tokenize", "run_dir": str(run_dir), "source": source, "tokenizer": tokenizer} | fields
    )


def tokenize_here(config: TokenizeConfig) -> Manifest:
    """What `run_tokenize` leaves behind, made in this process without Ray."""
    plan, tokenizer = make_source(config.source, s3=config.s3).plan(), Tokenizer.load(config.tokenizer)
    worker = UnitTokenizer(config, keys=plan.keys, fingerprint_digest=tokenizer.fingerprint.digest)
    storage = open_storage(config.run_dir, s3=config.s3)
    check_identity(storage, config=config, plan=plan, fingerprint=tokenizer.fingerprint)
    tally = Tally()
    for unit in plan.units:
        tally.add(worker.run(unit).record)
    manifest = make_manifest(config, plan=plan, tokenizer=tokenizer, tally=tally, poison=[])
    write_sidecars(storage, manifest)
    write_manifest(storage, manifest)
    return manifest


def files_of(run_dir: Path) -> dict[str, bytes]:
    """All files of a set whose bytes may not depend on the run: all but ledger and status, which hold times."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.parent.name != "ledger" and path.name not in VOLATILE
    }


def ten_crop_job(corpus: Path, run_dir: Path | str, **fields: Any) -> TokenizeConfig:
    """The job over a corpus of `write_ten_crop_corpus`; ten views a sample make a unit last about a second."""
    source = {"kind": "webdataset", "urls": [f"{corpus}/tars/*.tar"]}
    views = {"kind": "ten_crop"}
    return tokenize_config(run_dir, source=source, weights=corpus / "tiny.safetensors", views=views, **fields)


def write_ten_crop_corpus(root: Path, *, num_tars: int, samples_per_tar: int) -> Path:
    """Tars, a tokenizer, and in `whole/` the set of an uninterrupted run of `ten_crop_job`; returns `root`."""
    write_tiny_tokenizer(root / "tiny.safetensors")
    write_tars(root / "tars", num_tars=num_tars, samples_per_tar=samples_per_tar)
    tokenize_here(ten_crop_job(root, root / "whole"))
    return root
