"""Weights files as bytes: what a disk or a copy did to them is found, and others may read them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic_runs import FINGERPRINT, config_of, model_of

from pipeline.storage import ArtifactError
from training.llamagen import save_base_weights
from training.tensorar import TensorAR, build_model
from training.weights import load_model, save_model, warm_start


def written(path: Path, model: TensorAR) -> Path:
    save_model(path, model.state_dict(), config=model.config, fingerprint=FINGERPRINT, step=12)
    return path


def flip_a_bit(path: Path, *, of: torch.Tensor) -> None:
    """Flip the lowest bit of a tensor's first value where it lies in a file."""
    data, value = bytearray(path.read_bytes()), of.detach().numpy().tobytes()
    assert data.count(value) == 1
    data[data.index(value)] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_in_our_file_is_found(tmp_path: Path) -> None:
    model = model_of(window_size=4)
    path = written(tmp_path / "model.safetensors", model)
    flip_a_bit(path, of=model.base.output.weight)
    with pytest.raises(ArtifactError, match=r"safetensors: sha256 of the values must be [0-9a-f]{64}, got .*again"):
        load_model(path)
    with pytest.raises(ArtifactError, match=r"model.safetensors: sha256 of the values must be"):
        warm_start(build_model(model.config), path)


def test_a_file_of_before_without_the_hash_of_its_values_loads(tmp_path: Path) -> None:
    model = model_of(window_size=4)
    header = {"version": 1, "config": config_of(window_size=4).model_dump(mode="json"), "fingerprint": None, "step": 7}
    path = tmp_path / "model.safetensors"
    save_file(dict(model.state_dict()), path, metadata={"tensorar": json.dumps(header)})
    loaded, file = load_model(path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert file.step == 7


def test_a_flipped_bit_in_a_torch_checkpoint_is_found(tmp_path: Path) -> None:
    model, path = model_of(), tmp_path / "c2i.pt"
    save_base_weights(path, model.state_dict(), step=1)
    flip_a_bit(path, of=model.base.output.weight)
    with pytest.raises(ArtifactError, match=r"c2i.pt: each member must match its checksum, got a damaged \S+; copy or"):
        warm_start(build_model(config_of()), path)


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_checkpoint_without_checksums_loads(tmp_path: Path, is_zip: bool) -> None:
    model, fresh = model_of(), build_model(config_of())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": model.base.state_dict()}, tmp_path / "c2i.pt", _use_new_zipfile_serialization=is_zip)
    finally:
        torch.serialization.set_crc32_options(True)
    warm_start(fresh, tmp_path / "c2i.pt")
    assert torch.equal(fresh.base.output.weight, model.base.output.weight)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_a_written_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    code = "import sys; from pathlib import Path; from test_weights_file import written, model_of; "
    code += "written(Path(sys.argv[1]), model_of())"
    path = tmp_path / "model.safetensors"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(path)], umask=umask, env=environment, check=True)
    assert path.stat().st_mode & 0o777 == mode
    assert load_file(path)
