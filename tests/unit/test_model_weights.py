"""Weights in and out: what fits loads exactly, what does not is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.storage import ArtifactError
from tokenization.config import VQConfig
from tokenization.fingerprint import Fingerprint
from training.config import ModelConfig
from training.tensorar import TensorAR, build_model
from training.weights import load_base_weights, load_model, read_header, save_model, warm_start

FINGERPRINT = Fingerprint(
    weights_sha256="ab" * 32, network=VQConfig(codebook_size=24), image_size_px=24, batch_size=8, dtype="float32"
)


def _config(**changes: Any) -> ModelConfig:
    fields = {"num_layers": 1, "num_heads": 2, "model_dim": 16, "codebook_size": 24, "codes_per_side": 3}
    return ModelConfig(**(fields | {"num_classes": 5} | changes))


def _model(**changes: Any) -> TensorAR:
    model = build_model(_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def _save(model: TensorAR, path: Path) -> Path:
    save_model(path, model.state_dict(), config=model.config, fingerprint=FINGERPRINT, step=12)
    return path


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_saved_model_comes_back_with_all_it_says(tmp_path: Path) -> None:
    model = _model(window_size=4)
    loaded, file = load_model(_save(model, tmp_path / "model.safetensors"))
    assert _equal(loaded.state_dict(), model.state_dict())
    assert (file.config, file.fingerprint, file.step) == (model.config, FINGERPRINT, 12)
    assert not loaded.training
    codes, labels = torch.randint(0, 24, (2, 9, 4)), torch.tensor([0, 5])
    assert torch.equal(loaded(codes, labels), model.eval()(codes, labels))


def test_saving_the_same_state_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = _model()
    assert (
        _save(model, tmp_path / "a.safetensors").read_bytes() == _save(model, tmp_path / "b.safetensors").read_bytes()
    )


def test_bfloat16_weights_are_stored_as_float32(tmp_path: Path) -> None:
    model = _model().bfloat16()
    loaded, _ = load_model(_save(model, tmp_path / "model.safetensors"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert _equal({key: value.bfloat16() for key, value in loaded.state_dict().items()}, model.state_dict())


@pytest.mark.parametrize("layout", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_llamagen_files_of_every_layout_load(tmp_path: Path, layout: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in _model().base.state_dict().items()}
    whole: dict[str, Any] = state if layout is None else {layout: state, "steps": 3}
    if layout == "model":  # as DDP training writes it
        whole |= {"args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}
    path = tmp_path / "c2i_B_256.pt"
    torch.save(whole, path)
    expected = {key.removeprefix(prefix): value for key, value in state.items()}
    assert _equal(load_base_weights(path), expected)
    assert _equal(load_base_weights(whole), expected)
    model = build_model(_config(window_size=4))
    warm_start(model, path)
    assert _equal(dict(model.base.state_dict()), expected)


def test_an_old_rotary_table_in_the_file_is_tolerated(tmp_path: Path) -> None:
    state = _model().base.state_dict()
    torch.save({"model": state | {"freqs_cis": torch.zeros(3)}}, tmp_path / "old.pt")
    assert _equal(load_base_weights(tmp_path / "old.pt"), dict(state))


def test_a_base_file_leaves_exactly_the_new_modules_fresh(tmp_path: Path) -> None:
    base, model = _model(), build_model(_config(window_size=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    warm_start(model, _save(base, tmp_path / "base.safetensors"))
    after = model.state_dict()
    for key in after:
        expected = base.state_dict()[key] if key.startswith("base.") else before[key]
        assert torch.equal(after[key], expected), key


def test_a_tensorar_file_warm_starts_every_module(tmp_path: Path) -> None:
    trained, model = _model(window_size=4), build_model(_config(window_size=4))
    warm_start(model, _save(trained, tmp_path / "model.safetensors"))
    assert _equal(dict(model.state_dict()), dict(trained.state_dict()))


def test_a_checkpoint_directory_stands_for_its_weights(tmp_path: Path) -> None:
    model = _model()
    directory = tmp_path / "step_00000012"
    directory.mkdir()
    _save(model, directory / "model.safetensors")
    assert load_model(directory)[1].path == directory / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), r"1 missing \(base.norm.weight\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unexpected \(base.extra\)"),
        (
            lambda state: state.update({"output.weight": torch.zeros(9, 16)}),
            r"1 of another shape \(base.output.weight want \[24, 16\], got \[9, 16\]\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_key(tmp_path: Path, change: Any, message: str) -> None:
    state = dict(_model().base.state_dict())
    change(state)
    torch.save({"model": state}, tmp_path / "c2i.pt")
    model = build_model(_config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=message):
        warm_start(model, tmp_path / "c2i.pt")
    assert _equal(dict(model.state_dict()), before)


def test_modules_of_a_tensorar_file_are_never_dropped_silently(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"unexpected \(input_encoder\."):
        warm_start(build_model(_config()), _save(_model(window_size=4), tmp_path / "model.safetensors"))


def test_a_tensorar_file_that_lacks_a_module_key_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = _save(_model(window_size=4), tmp_path / "model.safetensors")
    header, state = read_header(path).model_dump_json(), load_file(path)
    del state["input_encoder.query"]
    save_file(state, path, metadata={"tensorar": header})
    with pytest.raises(ArtifactError, match=r"1 missing \(input_encoder.query\)"):
        warm_start(build_model(_config(window_size=4)), path)


def test_saving_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="of another shape"):
        save_model(
            tmp_path / "m.safetensors", _model().state_dict(), config=_config(num_classes=9), fingerprint=None, step=0
        )
    assert list(tmp_path.iterdir()) == []


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": _model().base.state_dict(), "args": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match="must be a torch checkpoint of tensors and plain values"):
        load_base_weights(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


def test_files_that_are_not_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"loss": 3.0}, tmp_path / "loss.pt")
    for name, message in (("empty", "got"), ("list", "must hold a dict, got list"), ("loss", "got keys loss")):
        with pytest.raises(ArtifactError, match=message):
            load_base_weights(tmp_path / f"{name}.pt")
    with pytest.raises(ArtifactError, match="nothing there; check the path"):
        load_model(tmp_path / "none")
    with pytest.raises(ArtifactError, match="a directory without one"):
        load_model(tmp_path)


def test_a_safetensors_file_that_is_damaged_or_foreign_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtifactError, match="metadata must hold 'tensorar', got none"):
        read_header(tmp_path / "foreign.safetensors")
    path = _save(_model(), tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="must be a safetensors file"):
        load_model(path)


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    header = read_header(_save(_model(), tmp_path / "model.safetensors"))
    later = header.model_copy(update={"version": 2}).model_dump_json()
    save_file({"x": torch.zeros(1)}, tmp_path / "later.safetensors", metadata={"tensorar": later})
    with pytest.raises(ArtifactError, match="version must be 1, got 2"):
        read_header(tmp_path / "later.safetensors")
