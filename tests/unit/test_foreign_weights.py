"""Files of others, as LlamaGen's training writes them and as they arrive broken: read to the value, or named.

One reader stands behind tokenizers and models; each case goes through both.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.storage import ArtifactError
from tokenization.config import VQConfig
from tokenization.foreign_weights import read_foreign_weights
from tokenization.vq import VQNetwork
from tokenization.weights_file import read_weights
from training.llamagen import load_base_weights

TINY = VQConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32)
WRAPPERS = ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module.", "model.")


def tiny_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return VQNetwork(TINY).state_dict()


def bare_state() -> dict[str, Tensor]:
    return {name: value for name, value in tiny_state().items() if name != "quantize.codebook_used"}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trained_content() -> dict[str, Any]:
    """What LlamaGen's `vq_train.py --ema` saves, its discriminator cut to a weight."""
    network = VQNetwork(TINY)
    network.load_state_dict(tiny_state())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    content = {"discriminator": {"main.0.weight": torch.ones(2, 3)}, "ema": VQNetwork(TINY).state_dict()}
    content |= {"model": tiny_state(), "steps": 7, "args": argparse.Namespace(lr=1e-4, vq_ckpt=None, gpu=0, ema=True)}
    optimizer.step()
    return content | {"optimizer": optimizer.state_dict(), "optimizer_disc": {"state": {}, "param_groups": []}}


def test_a_tokenizer_that_llamagens_training_wrote_has_the_weights_that_it_extracts_codes_with(tmp_path: Path) -> None:
    torch.save(trained_content(), tmp_path / "0000007.pt")
    assert equal(read_weights(tmp_path / "0000007.pt", network=TINY).state, bare_state())


@pytest.mark.parametrize("layout", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path, layout: str | None, prefix: str) -> None:
    state = {prefix + name: value for name, value in tiny_state().items()}
    torch.save(state if layout is None else {layout: state}, tmp_path / "weights.pt")
    assert equal(read_weights(tmp_path / "weights.pt", network=TINY).state, bare_state())
    assert equal(load_base_weights(tmp_path / "weights.pt"), tiny_state())


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(tiny_state(), path)
    data = bytearray(path.read_bytes())
    at = data.index(tiny_state()["quantize.embedding.weight"].numpy().tobytes()[:64])
    data[at + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"load weights {path}: each member must match its checksum, got a damaged"):
        read_weights(path, network=TINY)
    with pytest.raises(ArtifactError, match=f"load weights {path}: each member must match its checksum"):
        load_base_weights(path)


def test_a_foreign_safetensors_file_is_read_like_a_pickled_one(tmp_path: Path) -> None:
    save_file({f"module.{name}": value for name, value in tiny_state().items()}, tmp_path / "bare.safetensors")
    assert equal(read_weights(tmp_path / "bare.safetensors", network=TINY).state, bare_state())


def saved(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


ODD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (written(b""), "got an empty file; get it again"),
    "pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"), "a Git LFS pointer; fetch"),
    "page": (written(b"\n<!DOCTYPE html><html><body>Sign in</body></html>"), "got a web page; download the file"),
    "text": (written(b"not weights"), "must hold nothing but tensors and plain values, got .*; use the original file"),
    "list": (saved([1, 2]), "the file must hold a dict, got list"),
    "number for a name": (saved({0: torch.zeros(1)}), r"got a tensor of torch.float32 under 0 in a file with \['0'\]"),
    "number among names": (
        saved({"model": {"a": torch.zeros(1), 3: torch.zeros(1)}}),
        "got a tensor of torch.float32 under 3 in",
    ),
    "no tensor": (saved({"model": {"a": torch.zeros(1), "b": [1.0]}}), "got list under 'b' in a file with"),
    "no weights": (saved({"epoch": 3, "weights": {}}), r"got int under 'epoch' in a file with \['epoch', 'weights'\]"),
    "nothing": (saved({"model": {}}), r"got none in a file with \['model'\]"),
    "int8": (saved({"model": {"a": torch.zeros(1, dtype=torch.int8)}}), "got a tensor of torch.int8 under 'a'"),
    "complex": (saved({"a": torch.zeros(1, dtype=torch.complex64)}), "got a tensor of torch.complex64 under 'a'"),
}


@pytest.mark.parametrize(("write", "message"), ODD_FILES.values(), ids=ODD_FILES)
def test_files_that_hold_no_weights_are_named_with_what_they_are(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "odd.pt"
    write(path)
    with pytest.raises(ValueError, match=f"^load weights {path}: .*{message}"):
        read_weights(path, network=TINY)
    with pytest.raises(ArtifactError, match=f"^load weights {path}: .*{message}"):
        load_base_weights(path)


@pytest.mark.parametrize("name", ["empty", "pointer", "page"])
def test_safetensors_that_are_none_are_named_with_what_they_are(tmp_path: Path, name: str) -> None:
    write, message = ODD_FILES[name]
    write(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"must be whole safetensors, .*{message.removeprefix('got ')}"):
        read_weights(tmp_path / "odd.safetensors", network=TINY)


def test_integers_in_a_foreign_safetensors_file_are_refused(tmp_path: Path) -> None:
    state = bare_state() | {"quant_conv.bias": torch.zeros(8, dtype=torch.int8)}
    save_file(state, tmp_path / "quantized.safetensors")
    with pytest.raises(ValueError, match=r"got a tensor of torch.int8 under 'quant_conv.bias'"):
        read_weights(tmp_path / "quantized.safetensors", network=TINY)


@pytest.mark.parametrize("key", ["cls_embedding.cap_proj.fc1.weight", "cls_embedding.uncond_embedding"])
def test_a_text_conditional_model_is_refused_as_what_it_is(key: str) -> None:
    with pytest.raises(ArtifactError, match=f"class-conditional, got a text-conditional one .*{key}.*; use .* c2i"):
        load_base_weights({"model": {"norm.weight": torch.zeros(2), key: torch.zeros(2)}})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_damaged_file_is_read_or_refused_and_never_anything_else(tmp_path: Path, is_zip: bool) -> None:
    weight = torch.arange(16.0).view(4, 4)
    content = {"model": {"a.weight": weight}, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
    whole, draw, refused = (tmp_path / "whole.pt").read_bytes(), random.Random(0), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "damaged.pt").write_bytes(data)
        try:
            state = read_foreign_weights(tmp_path / "damaged.pt", ignored=set())
        except ValueError:
            refused += 1
        else:
            assert not is_zip or equal(state, {"a.weight": weight})  # only a zip has checksums
    assert refused > 200


@pytest.mark.parametrize(
    ("header", "at", "bit", "told"),
    [
        (b"PK\1\2", 6, 7, "zip file version 12.8"),
        (b"PK\1\2", 8, 0, "is encrypted, password required"),
        (b"PK\1\2", 10, 0, "compression method is not supported"),
        (b"PK\1\2", 10, 3, "while decompressing data"),
        (b"PK\3\4", 29, 7, "EOFError"),
    ],
    ids=["version", "flags", "unknown method", "deflate", "length"],
)
def test_a_flipped_bit_in_the_headers_of_a_zip_is_refused_like_one_in_a_tensor(
    tmp_path: Path, header: bytes, at: int, bit: int, told: str
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(header) + at] ^= 1 << bit
    path.write_bytes(data)
    message = f"load weights {path}: each member must match its checksum, got .*{told}.*; copy or download the file"
    with pytest.raises(ValueError, match=message):
        read_weights(path, network=TINY)
    with pytest.raises(ArtifactError, match=message):
        load_base_weights(path)
