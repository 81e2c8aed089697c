"""Recipes: one word that fills in what a train spec does not say about noise, loss weights and module warm-up.

Invariant: a field that the spec gives is never touched, and the resolved spec holds every value, so that a stored run
keeps its meaning when a recipe changes. Light: imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["paper", "tuned"]

RECIPES: dict[Recipe, dict[str, dict[str, Any]]] = {
    "paper": {
        "noise": {
            "schedule": "exponential",
            "end_point": "closed",
            "coupling": "independent",
            "own_draft_fraction": 0.0,
            "draft_temperature": 1.0,
            "beta_jitter": 0.0,
            "draft_weight": 1.0,
            "draft_gradient_scale": 1.0,
        },
        "optimizer": {"module_warmup_steps": 0},
    },
    "tuned": {
        "noise": {"own_draft_fraction": 0.75, "draft_weight": 0.1},
    },
}
"""Values by section and field; what a recipe leaves out is the field's default. `paper` is all of the paper's own."""


def with_recipe(spec: Mapping[str, Any], *, default: Recipe) -> dict[str, Any]:
    """Return the plain data of a train spec with its recipe's values where it gives none.

    At window_size 1 there are no drafts, and nothing is filled in; without warm_start there is no base model to warm
    modules up around, and those steps are not. Sections that are not mappings, and a recipe that there is not, are left
    for validation to name.

    Args:
        spec: plain data, not validated; not changed.
        default: the recipe of a spec that names none.
    """
    filled = dict(spec)
    recipe = spec.get("recipe", default)
    if not isinstance(recipe, str) or recipe not in RECIPES or _window_size(spec.get("model")) == 1:
        return filled
    for section, values in RECIPES[recipe].items():
        given = _given(spec.get(section, {}))
        if isinstance(given, Mapping):
            names = [name for name in values if not (_says(given, name) or _does_not_fit(name, spec))]
            filled[section] = {name: values[name] for name in names} | dict(given)
    return filled


def _given(section: Any) -> Any:
    """What a section says, a config object what it was made with."""
    names = getattr(section, "model_fields_set", None)
    return section if names is None else {name: getattr(section, name) for name in names}


def _window_size(model: Any) -> Any:
    return model.get("window_size", 1) if isinstance(model, Mapping) else getattr(model, "window_size", 1)


def _does_not_fit(name: str, spec: Mapping[str, Any]) -> bool:
    return name == "module_warmup_steps" and spec.get("warm_start") is None


def _says(section: Mapping[str, Any], name: str) -> bool:
    """Whether a section gives a field, or another that takes its place."""
    return name in section or (name == "draft_weight" and section.get("offset_weights") is not None)
