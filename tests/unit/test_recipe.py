"""Recipes: what one word fills in, what it leaves alone, and that stored runs keep their meaning."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.run import remember_spec
from jobs.spec import SpecError, load_spec, shipped_spec
from pipeline.storage import ArtifactError
from training.config import NoiseConfig, OptimizerConfig, TrainConfig
from training.recipe import RECIPES, with_recipe


def spec_of(*, window_size: int = 4, **fields: Any) -> dict[str, Any]:
    model = {"num_layers": 1, "num_heads": 1, "model_dim": 8, "codes_per_side": 4, "window_size": window_size}
    return {"kind": "train", "run_dir": "run", "data": {"shards": "set"}, "model": model, "num_steps": 5} | fields


def config_of(**fields: Any) -> TrainConfig:
    return TrainConfig.model_validate(spec_of(**fields))


def test_the_papers_recipe_is_the_papers_setting_word_by_word() -> None:
    config = config_of(recipe="paper")
    noise = config.noise
    assert (noise.schedule, noise.end_point, noise.coupling) == ("exponential", "closed", "independent")
    assert (noise.own_draft_fraction, noise.beta_jitter, noise.scored_stride) == (0.0, 0.0, 1)
    assert (noise.draft_temperature, noise.draft_gradient_scale) == (1.0, 1.0)
    assert noise.weights_of_offsets(4) == (1.0, 1.0, 1.0, 1.0)
    assert config.optimizer.module_warmup_steps == 0
    # What a spec does not say and no recipe fills in is the paper's as well: stored specs rest on it.
    assert (config.noise, config.optimizer) == (NoiseConfig(), OptimizerConfig())


def test_the_tuned_recipe_draws_own_drafts_and_weighs_them_lightly_at_any_window_size() -> None:
    for window_size in (2, 4, 8):
        config = config_of(recipe="tuned", window_size=window_size)
        assert config.noise.own_draft_fraction == 0.75
        assert config.noise.weights_of_offsets(window_size) == (1.0, *[0.1] * (window_size - 1))
    assert config.noise.schedule == "exponential"


@pytest.mark.parametrize(
    ("noise", "fraction", "weights"),
    [
        ({"own_draft_fraction": 0.0}, 0.0, (1.0, 0.1, 0.1, 0.1)),
        ({"draft_weight": 1.0}, 0.75, (1.0, 1.0, 1.0, 1.0)),
        ({"offset_weights": [1, 0.3, 0.2, 0.1]}, 0.75, (1.0, 0.3, 0.2, 0.1)),
        ({"offset_weights": None}, 0.75, (1.0, 0.1, 0.1, 0.1)),
    ],
)
def test_what_a_spec_gives_wins(noise: dict[str, Any], fraction: float, weights: tuple[float, ...]) -> None:
    config = config_of(recipe="tuned", noise=noise)
    assert config.noise.own_draft_fraction == fraction
    assert config.noise.weights_of_offsets(4) == weights


def test_a_section_that_is_a_config_object_is_filled_in_as_well() -> None:
    filled = with_recipe({"model": {"window_size": 4}, "noise": NoiseConfig(schedule="sine")}, default="tuned")
    assert filled["noise"] == {"schedule": "sine", "own_draft_fraction": 0.75, "draft_weight": 0.1}


def test_every_field_that_a_recipe_names_is_one_and_the_data_is_not_touched() -> None:
    sections = {"noise": NoiseConfig, "optimizer": OptimizerConfig}
    for recipe in RECIPES.values():
        for section, values in recipe.items():
            assert values.keys() <= sections[section].model_fields.keys()
    spec = spec_of(recipe="tuned", noise={"schedule": "sine"})
    before = json.dumps(spec)
    assert with_recipe(spec, default="paper")["noise"]["schedule"] == "sine"
    assert json.dumps(spec) == before


def test_a_base_model_has_nothing_to_fill_in() -> None:
    assert config_of(recipe="tuned", window_size=1).noise == NoiseConfig()


def test_modules_are_warmed_up_around_a_warm_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "tuned", {"optimizer": {"module_warmup_steps": 7}})
    assert config_of(recipe="tuned", warm_start="base").optimizer.module_warmup_steps == 7
    assert config_of(recipe="tuned").optimizer.module_warmup_steps == 0
    assert config_of(recipe="tuned", window_size=1, warm_start="base").optimizer.module_warmup_steps == 0


def test_a_resolved_spec_means_the_same_again_whatever_a_recipe_says_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    for noise in ({}, {"offset_weights": [1, 0.3, 0.2, 0.1]}):
        config = config_of(recipe="tuned", noise=noise)
        monkeypatch.setitem(RECIPES, "tuned", {"noise": {"own_draft_fraction": 0.5, "draft_weight": 0.7}})
        assert TrainConfig.model_validate(config.model_dump()) == config
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
        monkeypatch.undo()


def test_the_demo_trains_by_the_tuned_recipe_and_says_nothing_beside_it() -> None:
    spec = yaml.safe_load(shipped_spec("train_tensorar").read_text())
    assert spec["recipe"] == "tuned"
    assert "noise" not in spec


def stored(run_dir: Path, fields: dict[str, Any]) -> None:
    """A run that was begun with a resolved spec."""
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000001" / "record.json").touch()
    (run_dir / "spec.json").write_text(json.dumps(fields))


def without_new_fields(config: TrainConfig) -> dict[str, Any]:
    """What the version before recipes would have stored."""
    fields = config.model_dump(mode="json")
    del fields["recipe"]
    for name in ("draft_temperature", "beta_jitter", "draft_weight", "draft_gradient_scale"):
        del fields["noise"][name]
    del fields["optimizer"]["module_warmup_steps"]
    return fields


def test_a_run_from_before_recipes_goes_on_with_its_own_setting_alone(tmp_path: Path) -> None:
    noise = {"own_draft_fraction": 0.75}
    stored(tmp_path, without_new_fields(config_of(run_dir=str(tmp_path), recipe="paper", noise=noise)))
    message = r"differ: noise\.draft_weight \(there 1\.0, in the spec 0\.1\); set another"
    with pytest.raises(ArtifactError, match=message):
        remember_spec(config_of(run_dir=str(tmp_path), recipe="tuned", noise=noise))
    remember_spec(config_of(run_dir=str(tmp_path), recipe="paper", noise=noise))


def test_a_word_for_the_same_setting_may_change(tmp_path: Path) -> None:
    stored(tmp_path, config_of(run_dir=str(tmp_path), recipe="tuned").model_dump(mode="json"))
    noise = {"own_draft_fraction": 0.75, "draft_weight": 0.1}
    remember_spec(config_of(run_dir=str(tmp_path), recipe="paper", noise=noise))
    with pytest.raises(ArtifactError, match=r"noise\.own_draft_fraction \(there 0\.75, in the spec 0\.0\)"):
        remember_spec(config_of(run_dir=str(tmp_path), recipe="paper", noise={"draft_weight": 0.1}))


def problems_of(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({name: v for name, v in spec_of().items() if name != "model"}) + text)
    with pytest.raises(SpecError) as raised:
        load_spec(path)
    return [problem.removeprefix(f"{path}:") for problem in raised.value.problems]


MODEL = "model: {num_layers: 1, num_heads: 1, model_dim: 8, codes_per_side: 4, window_size: %d}\n"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            MODEL % 4 + "recipe: tunned\nnoise:\n  own_draft_fracton: 0.5\n",
            [
                "7: recipe must be one of paper, tuned, got 'tunned'; did you mean tuned?",
                "9: noise.own_draft_fracton is not a field; did you mean own_draft_fraction?",
            ],
        ),
        (
            MODEL % 4 + "recipe: tuned\nnoise:\n  beta_jitter: 1.5\n  draft_temperature: 0\n",
            [
                "9: noise.beta_jitter must be at most 1, got 1.5",
                "10: noise.draft_temperature must be above 0, got 0",
            ],
        ),
        (MODEL % 4 + "recipe: tuned\nnoise: 3\n", ["8: noise must be a group of fields, got 3"]),
        (
            MODEL % 4 + "recipe: tuned\nnoise:\n  draft_weight: 0.5\n  offset_weights: [1, 1, 1, 1]\n",
            [
                "9: noise.draft_weight must not stand beside noise.offset_weights, which say all, got 0.5; remove one "
                "of them"
            ],
        ),
        (
            MODEL % 4 + "optimizer:\n  module_warmup_steps: 3\n",
            [
                "8: optimizer.module_warmup_steps must be 0 without warm_start, since nothing can be learned around "
                "the zero head of a fresh base model, got 3; set warm_start or remove it"
            ],
        ),
        (
            MODEL % 1 + "optimizer:\n  module_warmup_steps: 3\n",
            [
                "8: optimizer.module_warmup_steps must be 0 at model.window_size 1, where there are no modules, got 3; "
                "remove it"
            ],
        ),
    ],
)
def test_errors_name_the_line_that_the_user_wrote(tmp_path: Path, text: str, problems: list[str]) -> None:
    assert problems_of(tmp_path, text) == problems
