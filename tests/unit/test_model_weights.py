"""Weights in and out: what fits loads exactly, what does not is named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_runs import FINGERPRINT, config_of, model_of, write_run
from torch import Tensor

from jobs.export import export_directory
from pipeline.config import S3Config
from pipeline.storage import ArtifactError
from training.config import ModelConfig
from training.llamagen import load_base_weights, save_base_weights
from training.tensorar import TensorAR, build_model
from training.weights import load_model, save_model, warm_start
from training.weights_file import read_header


def _save(model: TensorAR, path: Path) -> Path:
    save_model(path, model.state_dict(), config=model.config, fingerprint=FINGERPRINT, step=12)
    return path


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_saved_model_comes_back_with_all_it_says(tmp_path: Path) -> None:
    model = model_of(window_size=4)
    loaded, file = load_model(_save(model, tmp_path / "model.safetensors"))
    assert _equal(loaded.state_dict(), model.state_dict())
    assert (file.config, file.fingerprint, file.step) == (model.config, FINGERPRINT, 12)
    assert not loaded.training
    codes, labels = torch.randint(0, 24, (2, 9, 4)), torch.tensor([0, 5])
    assert torch.equal(loaded(codes, labels), model.eval()(codes, labels))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = model_of(window_size=4)
    with torch.no_grad():
        model.output_decoder.attention.wk.weight[3, 2] = float("nan")
    path = _save(model, tmp_path / "model.safetensors")
    with pytest.raises(
        ArtifactError,
        match=r"finite, got NaN or infinity in 1 tensors, output_decoder.attention.wk.weight first; take an",
    ):
        load_model(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["base.safetensors", "base.pt"])
def test_a_warm_start_from_weights_that_are_not_finite_is_refused_by_name(
    tmp_path: Path, name: str, value: float
) -> None:
    base, model = model_of(), build_model(config_of(window_size=4))
    with torch.no_grad():
        base.base.norm.weight[1] = value
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if name == "base.pt":
        save_base_weights(tmp_path / name, base.state_dict(), step=1)
    else:
        _save(base, tmp_path / name)
    with pytest.raises(ArtifactError, match=r"NaN or infinity in 1 tensors, base.norm.weight first; .* another file"):
        warm_start(model, tmp_path / name)
    assert _equal(dict(model.state_dict()), before)


def test_saving_the_same_state_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = model_of()
    assert (
        _save(model, tmp_path / "a.safetensors").read_bytes() == _save(model, tmp_path / "b.safetensors").read_bytes()
    )


def test_bfloat16_weights_are_stored_as_float32(tmp_path: Path) -> None:
    model = model_of().bfloat16()
    loaded, _ = load_model(_save(model, tmp_path / "model.safetensors"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert _equal({key: value.bfloat16() for key, value in loaded.state_dict().items()}, model.state_dict())


@pytest.mark.parametrize("layout", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_llamagen_files_of_every_layout_load(tmp_path: Path, layout: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in model_of().base.state_dict().items()}
    whole: dict[str, Any] = state if layout is None else {layout: state, "steps": 3}
    if layout == "model":  # as DDP training writes it
        whole |= {"args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}
    path = tmp_path / "c2i_B_256.pt"
    torch.save(whole, path)
    expected = {key.removeprefix(prefix): value for key, value in state.items()}
    assert _equal(load_base_weights(path), expected)
    assert _equal(load_base_weights(whole), expected)
    model = build_model(config_of(window_size=4))
    warm_start(model, path)
    assert _equal(dict(model.base.state_dict()), expected)


def test_an_old_rotary_table_in_the_file_is_tolerated(tmp_path: Path) -> None:
    state = model_of().base.state_dict()
    torch.save({"model": state | {"freqs_cis": torch.zeros(3)}}, tmp_path / "old.pt")
    assert _equal(load_base_weights(tmp_path / "old.pt"), dict(state))


def test_a_base_file_leaves_exactly_the_new_modules_fresh(tmp_path: Path) -> None:
    base, model = model_of(), build_model(config_of(window_size=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    warm_start(model, _save(base, tmp_path / "base.safetensors"))
    after = model.state_dict()
    for key in after:
        expected = base.state_dict()[key] if key.startswith("base.") else before[key]
        assert torch.equal(after[key], expected), key


def test_a_tensorar_file_warm_starts_every_module(tmp_path: Path) -> None:
    trained, model = model_of(window_size=4), build_model(config_of(window_size=4))
    warm_start(model, _save(trained, tmp_path / "model.safetensors"))
    assert _equal(dict(model.state_dict()), dict(trained.state_dict()))


def _plus_one(model: TensorAR) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in model.state_dict().items()}


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000012"])
def test_a_run_and_its_checkpoint_stand_for_their_weights(tmp_path: Path, place: str) -> None:
    model = model_of(window_size=4)
    write_run(tmp_path / "run", model)
    path = tmp_path / "run" / place
    loaded, file = load_model(path)
    assert _equal(loaded.state_dict(), model.state_dict())
    assert (file.config, file.fingerprint, file.step) == (model.config, FINGERPRINT, 12)
    assert file.path == str(tmp_path / "run" / "checkpoints" / "step_00000012")
    assert _equal(load_model(path, use_ema=True)[0].state_dict(), _plus_one(model))
    fresh = build_model(config_of(window_size=4))
    warm_start(fresh, path)
    assert _equal(fresh.state_dict(), model.state_dict())


def test_a_named_checkpoint_that_is_damaged_is_refused_by_file(tmp_path: Path) -> None:
    write_run(tmp_path, model_of())
    path = tmp_path / "checkpoints" / "step_00000012"
    (path / "rank_00001.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"step 12 in .* is damaged: step_00000012/rank_00001.safetensors has 0 by"):
        load_model(path)


def test_a_step_other_than_that_of_the_named_checkpoint_is_refused(tmp_path: Path) -> None:
    for step in (12, 20):
        write_run(tmp_path / "run", model_of(), step=step)
    place, output = str(tmp_path / "run" / "checkpoints" / "step_00000012"), str(tmp_path / "out.safetensors")
    with pytest.raises(ArtifactError, match="step must be the directory's own, 12, got 20; leave the step out"):
        export_directory(place, to="safetensors", output=output, s3=S3Config(), step=20)
    assert not Path(output).exists()
    assert "of step 12" in export_directory(place, to="safetensors", output=output, s3=S3Config(), step=12)


def test_an_average_is_only_taken_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="use_ema must be off for a file"):
        load_model(_save(model_of(), tmp_path / "model.safetensors"), use_ema=True)


@pytest.mark.parametrize("use_ema", [False, True])
def test_an_exported_run_loads_as_the_run_does(tmp_path: Path, use_ema: bool) -> None:
    model, output = model_of(window_size=4), str(tmp_path / "out.safetensors")
    write_run(tmp_path / "run", model)
    lines = export_directory(str(tmp_path / "run"), to="safetensors", output=output, s3=S3Config(), use_ema=use_ema)
    assert f"{'average of the weights' if use_ema else 'weights'} of step 12" in lines
    loaded, file = load_model(output)
    assert _equal(loaded.state_dict(), _plus_one(model) if use_ema else dict(model.state_dict()))
    assert (file.config, file.fingerprint, file.step) == (model.config, FINGERPRINT, 12)


def test_a_run_exported_for_llamagen_has_exactly_its_keys_and_loads_without_pickles(tmp_path: Path) -> None:
    model, output = model_of(window_size=4), str(tmp_path / "out.pt")
    write_run(tmp_path / "run", model)
    export_directory(str(tmp_path / "run"), to="llamagen", output=output, s3=S3Config(), step=12)
    loaded = torch.load(output, weights_only=True)
    assert sorted(loaded) == ["model", "steps"]
    assert _equal(loaded["model"], dict(model.base.state_dict()))
    fresh = build_model(config_of(window_size=4))
    warm_start(fresh, output)
    assert _equal(dict(fresh.base.state_dict()), dict(model.base.state_dict()))


def test_llamagens_keys_of_a_named_size_are_the_ones_we_export(tmp_path: Path) -> None:
    keys = json.loads((Path(__file__).parents[1] / "oracles" / "keys" / "llamagen_gpt_B_c2i.json").read_text())["keys"]
    with torch.device("meta"):
        state = build_model(ModelConfig(size="B", window_size=4)).state_dict()
    save_base_weights(tmp_path / "b.pt", {key: torch.tensor(value.shape) for key, value in state.items()}, step=0)
    exported = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    shapes = {key: shape for key, (shape, kind) in keys.items() if kind == "param"}
    assert {key: value.tolist() for key, value in exported.items()} == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "llamagen", "output": "x.safetensors"}, r"must be a file that ends in \.pt for --to llamagen"),
        ({"step": 13}, r"must be one of \[12\], got 13"),
    ],
)
def test_an_export_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_run(tmp_path / "run", model_of())
    arguments = {"to": "safetensors", "output": str(tmp_path / "x.safetensors"), "s3": S3Config()} | changes
    with pytest.raises(ArtifactError, match=message):
        export_directory(str(tmp_path / "run"), **arguments)


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
    state = dict(model_of().base.state_dict())
    change(state)
    torch.save({"model": state}, tmp_path / "c2i.pt")
    model = build_model(config_of())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=message):
        warm_start(model, tmp_path / "c2i.pt")
    assert _equal(dict(model.state_dict()), before)


def test_modules_of_a_tensorar_file_are_never_dropped_silently(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"unexpected \(input_encoder\."):
        warm_start(build_model(config_of()), _save(model_of(window_size=4), tmp_path / "model.safetensors"))


def test_a_tensorar_file_that_lacks_a_module_key_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = _save(model_of(window_size=4), tmp_path / "model.safetensors")
    header, state = read_header(path).model_copy(update={"weights_sha256": None}), load_file(path)
    del state["input_encoder.query"]
    save_file(state, path, metadata={"tensorar": header.model_dump_json()})
    with pytest.raises(ArtifactError, match=r"1 missing \(input_encoder.query\)"):
        warm_start(build_model(config_of(window_size=4)), path)


def test_saving_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="of another shape"):
        save_model(
            tmp_path / "m.safetensors",
            model_of().state_dict(),
            config=config_of(num_classes=9),
            fingerprint=None,
            step=0,
        )
    assert list(tmp_path.iterdir()) == []


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": model_of().base.state_dict(), "args": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match="must hold nothing but tensors and plain values"):
        load_base_weights(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


def test_files_that_are_not_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"loss": 3.0}, tmp_path / "loss.pt")
    for name, message in (
        ("empty", "an empty file"),
        ("list", "must hold a dict, got list"),
        ("loss", "got float under 'loss'"),
    ):
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
    path = _save(model_of(), tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="must be a safetensors file"):
        load_model(path)


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    header = read_header(_save(model_of(), tmp_path / "model.safetensors"))
    values = header.model_dump(mode="json")
    later, stranger = values | {"version": 2, "new": 1}, values | {"new": 1}
    for name, header_values in (("later", later), ("stranger", stranger)):
        metadata = {"tensorar": json.dumps(header_values)}
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    with pytest.raises(ArtifactError, match="version 1 header, got version 2; install the tensorar that wrote"):
        read_header(tmp_path / "later.safetensors")
    with pytest.raises(
        ArtifactError, match=r"version 1 header, got new: extra inputs .*; install the tensorar that wrote"
    ):
        read_header(tmp_path / "stranger.safetensors")
