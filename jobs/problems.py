"""What pydantic found wrong with a spec, in plain words, with the path of the field and a suggestion.

Pure: no files, no YAML. A problem names the field, the rule and the value; the reader adds the place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]

_TYPE_WORDS = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "string_": "text",
    "bool_": "true or false",
    "tuple_": "a list",
    "list_": "a list",
    "model_": "a group of fields",
    "dict_": "a group of fields",
    "dataclass_": "a group of fields",
}
_BOUND_WORDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong: where in the data, and the sentence."""

    path: KeyPath
    message: str
    is_missing: bool = False
    is_unknown: bool = False
    renamed: KeyPath | None = None
    """For an unknown field: the path that was probably meant."""


def problems_of(error: ValidationError, *, model: type[BaseModel]) -> list[Problem]:
    """Problems behind a validation error, in the order in which pydantic found them.

    Args:
        error: What validating against `model` raised.
        model: The config of the whole spec.
    """
    return [_problem(details, model=model) for details in error.errors()]


def without_unknown(data: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """A copy of the data whose unknown fields carry the name that was meant, or are gone."""
    copy: dict[str, Any] = _copied(data)
    for problem in problems:
        if not problem.is_unknown:
            continue
        level: Any = copy
        for part in problem.path[:-1]:
            level = level[part]
        value = level.pop(problem.path[-1])
        if problem.renamed is not None:
            level.setdefault(problem.renamed[-1], value)
    return copy


def truth_values(given: Any, *, taken: Any, path: KeyPath = ()) -> Iterator[Problem]:
    """Problems of each true or false in a valid spec that pydantic took for 1 or 0.

    Args:
        given: The data of the spec, or what is at `path` in it.
        taken: What the validated config holds there.
        path: Where.
    """
    if isinstance(given, dict):
        for key, inner in given.items():
            yield from truth_values(inner, taken=taken[key], path=(*path, key))
    elif isinstance(given, list):
        for index, inner in enumerate(given):
            yield from truth_values(inner, taken=taken[index], path=(*path, index))
    elif isinstance(given, bool) and not isinstance(taken, bool):
        yield Problem(path, f"{'.'.join(map(str, path))} must be a number, got {given!r}; write it in digits")


def closest(word: str, choices: list[str]) -> str:
    """`; did you mean X?` for the choice nearest to a word, or nothing."""
    found = _nearest(word, choices)
    return f"; did you mean {found}?" if found else ""


def quoted(value: Any) -> str:
    """A value as messages show it: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _nearest(word: str, choices: list[str]) -> str | None:
    found = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    return found[0] if found else None


def _problem(details: ErrorDetails, *, model: type[BaseModel]) -> Problem:
    path, owner = _follow(model, details["loc"])
    dotted = ".".join(map(str, path))
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, dotted=dotted, owner=owner)
    if kind == "missing":
        return _missing(path, dotted=dotted, owner=owner, value=value)
    if kind == "value_error":
        text = str(context["error"])
        return Problem(path, f"{dotted}: {text}" if path else text)
    return Problem(path, f"{dotted} {_rule(kind, value, context, message=details['msg'])}")


def _rule(kind: str, value: Any, context: dict[str, Any], *, message: str) -> str:
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"must be one of {', '.join(choices)}, got {quoted(value)}{closest(str(value), choices)}"
    if kind == "union_tag_invalid":
        choices = [choice.strip("'") for choice in str(context["expected_tags"]).split(", ")]
        tag = str(context["tag"])
        return f"must have kind: one of {', '.join(choices)}, got {tag!r}{closest(tag, choices)}"
    if kind == "union_tag_not_found":
        return "must be a group of fields with a kind" + ("" if isinstance(value, dict) else f", got {quoted(value)}")
    if kind in _BOUND_WORDS:
        word, name = _BOUND_WORDS[kind]
        return f"must be {word} {_number(context[name])}, got {quoted(value)}"
    if kind == "too_long":
        return f"must have at most {context['max_length']} values, got {context['actual_length']}"
    if kind == "too_short":
        return f"must have at least {context['min_length']} values, got {context['actual_length']}"
    for prefix, words in _TYPE_WORDS.items():
        if kind.startswith(prefix):
            return f"must be {words}, got {quoted(value)}"
    return f"is wrong: {message[:1].lower()}{message[1:]}, got {quoted(value)}"


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unknown(path: KeyPath, *, dotted: str, owner: type[BaseModel] | None) -> Problem:
    fields = list(owner.model_fields) if owner is not None else []
    meant = _nearest(str(path[-1]), fields)
    advice = f"did you mean {meant}?" if meant else f"the fields here are {', '.join(fields)}"
    renamed = (*path[:-1], meant) if meant else None
    return Problem(path, f"{dotted} is not a field; {advice}", is_unknown=True, renamed=renamed)


def _missing(path: KeyPath, *, dotted: str, owner: type[BaseModel] | None, value: Any) -> Problem:
    if isinstance(path[-1], int):
        whole = dotted.rpartition(".")[0]
        return Problem(path, f"{whole} must have more values, got {quoted(value)}", is_missing=True)
    field = owner.model_fields.get(path[-1]) if owner is not None else None
    description = field.description if field is not None else None
    meaning = f": {description.strip().rstrip('.').splitlines()[0]}" if description else ""
    return Problem(path, f"{dotted} is required{meaning}", is_missing=True)


def _follow(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """Path in the data of pydantic's location (which also names union tags), and the config that owns its end."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = None
    annotation: Any = model
    for part in loc:
        models = _models_of(annotation)
        if len(models) > 1:
            annotation = next(one for one in models if part in get_args(one.model_fields["kind"].annotation))
            continue
        owner = models[0] if models else None
        field = owner.model_fields.get(str(part)) if owner is not None else None
        annotation = field.annotation if field is not None else None
        path.append(part)
    return tuple(path), owner


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_of(inner)]
