"""YAML specs to validated configs; every problem of a file is told at once, with its place and a suggestion.

Light: imports no torch, ray or deepspeed, so `tensorar validate` answers at once. A place is `file:line`, or the
`--set` that brought the value. YAML is read with safe types only; aliases are refused: their expansion has no bound. So
are tags and deep nesting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.reader import ReaderError

from jobs.problems import Problem, closest, problems_of, quoted, truth_values, without_unknown
from pipeline.config import TokenizeConfig
from tokenization.config import FitTokenizerConfig
from training.config import SampleConfig, TrainConfig
from training.evaluation.config import EvaluateConfig

Spec = FitTokenizerConfig | TokenizeConfig | TrainConfig | SampleConfig | EvaluateConfig
KeyPath = tuple[str | int, ...]

KINDS: dict[str, type[Spec]] = {
    "fit_tokenizer": FitTokenizerConfig,
    "tokenize": TokenizeConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
}
SPECS_DIR = Path(__file__).parent / "specs"
GRID = "grid"
"""Top-level field that makes a spec a study of several runs; read by `jobs.grid`."""
BASELINE = "baseline"
"""Top-level field of such a spec: the cases that its other runs are held against."""
MAX_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_SURROGATE = re.compile("[\ud800-\udfff]")
_Place = Callable[[int], str]
"""Line of a text to its place."""


class SpecError(ValueError):
    """A spec has problems; one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2: `1e-3` is one, `1:30`, `1_000` and `2024-01-31` are text."""


_Loader.yaml_implicit_resolvers = {}  # PyYAML's are those of YAML 1.1
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """Plain data of one spec, where each value came from, and what is wrong with the YAML itself."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    place_of: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    has_lines: bool = True
    """Not so of the value of a `--set`."""

    def add_problem(self, node: yaml.Node, message: str) -> None:
        """Add what is wrong with a node."""
        self.problems.append((node.start_mark.line + 1 if self.has_lines else 0, f"{self.spot(node)}: {message}"))

    def spot(self, node: yaml.Node) -> str:
        """Place of a node."""
        return f"{self.name}:{node.start_mark.line + 1}" if self.has_lines else self.name

    def place(self, path: KeyPath) -> str:
        """Place of the value at `path`, or of the nearest mapping around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.place_of:
                return self.place_of[path[:length]]
        return f"{self.name}:1"


def shipped_spec(name: str) -> Path:
    """Path of a spec that ships with the project, such as `train_base`."""
    return SPECS_DIR / f"{name}.yaml"


def from_here(path: Path) -> Path:
    """The path as it is typed in this directory: relative where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def load_spec(path: Path | str, overrides: Sequence[str] = ()) -> Spec:
    """The validated spec in a YAML file.

    Args:
        path: The file.
        overrides: `a.b=value` assignments laid over the file, their values read as YAML.

    Raises:
        SpecError: the file or an override has problems; it carries all of them, each `file:line: path message`.
    """
    document = read_document(path, overrides)
    if GRID in document.data:
        place = document.place((GRID,))
        raise SpecError([f"{place}: grid makes a study of several runs, and one run is asked for; name a spec without"])
    return validated(document)


def read_document(path: Path | str, overrides: Sequence[str] = ()) -> Document:
    """The data of a YAML file, not yet validated, with the overrides laid over it.

    Raises:
        SpecError: the file cannot be read as a mapping, or an override does not fit.
    """
    document = _read(Path(path))
    for override in overrides:
        _override(document, override)
    return document


def _read(path: Path) -> Document:
    document = Document(name=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SpecError([f"{path}: reading the spec: {reason}; check the path"]) from error
    except UnicodeDecodeError as error:
        raise SpecError([f"{path}: reading the spec: it must be UTF-8 text; save it as such"]) from error
    try:
        node = _composed(text, lambda line: f"{path}:{line}")
    except yaml.YAMLError as error:
        raise SpecError([_syntax_problem(path, text, error)]) from error
    if node is None:
        raise SpecError([f"{path}:1: the spec is empty; begin with kind: and one of {', '.join(KINDS)}"])
    data = _construct(document, node, ())
    if not isinstance(data, dict):
        raise SpecError([f"{path}:1: a spec must be a mapping of fields, got {quoted(data)}"])
    document.data = data
    return document


def _composed(text: str, place: _Place) -> yaml.Node | None:
    """The node of a YAML text; raises SpecError for what would take more than its length to read."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            name = f"*{event.anchor}"
            raise SpecError([f"{place(line)}: {name} is an alias, which specs do not have; write the value out"])
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise SpecError([f"{place(line)}: a spec must nest at most {MAX_DEPTH} levels, got more; flatten it"])
    return yaml.compose(text, Loader=_Loader)


def _syntax_problem(path: Path, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = 1 if mark is None else mark.line + 1
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{path}:{line}: not valid YAML: {problem}; mend the line or the one before it"


def _construct(document: Document, node: yaml.Node, path: KeyPath) -> Any:
    document.place_of.setdefault(path, document.spot(node))
    implied = _Loader("").resolve(type(node), node.value, (getattr(node, "style", "") is None, True))  # type: ignore[no-untyped-call]
    if node.tag != implied:
        tag = node.tag.replace(_TAG, "!!", 1)
        document.add_problem(node, f"{_dotted(path)}a value must have no tag, got {tag}; leave it out")
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(document, node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(document, child, (*path, index)) for index, child in enumerate(node.value)]
    return _scalar(document, node, path) if node.tag == implied else _text(document, node, path)


def _construct_mapping(document: Document, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _text(document, key_node, path) if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in data:
            first = document.place_of[(*path, key)].rpartition(":")[2]
            where = f", first on line {first}" if document.has_lines else ""
            document.add_problem(key_node, f"{'.'.join(map(str, (*path, key)))} is given twice{where}; keep one")
            continue
        document.place_of[(*path, key)] = document.spot(key_node)
        data[key] = _construct(document, value_node, (*path, key))
    return data


def _scalar(document: Document, node: yaml.Node, path: KeyPath) -> Any:
    """The value of a scalar; its text where it has none, so that its field says what it must be."""
    kind, text = node.tag.removeprefix(_TAG), _text(document, node, path)
    if kind == "int" and re.match("[-+]?0[0-9]", text):
        rule = f"a number must have no leading zeros, got {text}"
        document.add_problem(node, f"{_dotted(path)}{rule}; remove them, write 0o for octal, or quote a text")
        return text
    if kind == "int":
        try:
            return int(text, base=0)
        except ValueError:  # of more digits than Python reads
            return text
    return text if kind == "str" else _Loader("").construct_object(node)


def _text(document: Document, node: yaml.Node, path: KeyPath) -> str:
    text = str(node.value)
    if not _SURROGATE.search(text):
        return text
    shown = text.encode(errors="backslashreplace").decode()
    rule = f"a text must have whole characters, got '{shown}'"
    document.add_problem(node, f"{_dotted(path)}{rule}; write the character itself")
    return shown


def _dotted(path: KeyPath) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""


def _override(document: Document, override: str) -> None:
    place = f"--set {override}"
    name, equals, text = override.partition("=")
    keys = field_path(name.strip())
    if not equals or not all(keys):
        raise SpecError([f"{place}: an override must be field=value or group.field=value, got {override!r}"])
    try:
        node = _composed(text, lambda _: place)
    except yaml.YAMLError as error:
        raise SpecError([f"{place}: the value must be YAML, got {text!r}; quote it"]) from error
    read = Document(name=place, has_lines=False)
    value = None if node is None else _construct(read, node, keys)
    document.problems += read.problems
    lay_value(document, keys, value, place=place)


def field_path(name: str) -> KeyPath:
    """Keys of a dotted field; an axis of a grid, whose name may have dots itself, is one key."""
    first, dot, rest = name.partition(".")
    return (first, rest) if first == GRID and dot else tuple(name.split("."))


def lay_value(document: Document, keys: KeyPath, value: Any, *, place: str) -> None:
    """Set one value of a document, whole, and where it came from.

    Raises:
        SpecError: a field above it holds a value and has no fields.
    """
    level = document.data
    for depth, key in enumerate(keys[:-1], start=1):
        if key not in level:
            document.place_of[keys[:depth]] = place
        inner = level.setdefault(str(key), {})
        if not isinstance(inner, dict):
            whole = ".".join(map(str, keys[:depth]))
            raise SpecError([f"{place}: {whole} holds {quoted(inner)} and has no fields; set it as a whole"])
        level = inner
    level[str(keys[-1])] = value
    for known in [path for path in document.place_of if path[: len(keys)] == keys]:
        del document.place_of[known]
    document.place_of[keys] = place


def line_of(problem: str) -> int:
    """Line that a problem's place names, for sorting; 0 where that is a `--set`."""
    found = re.match(r"[^ ]*?:(\d+): ", problem)
    return int(found[1]) if found else 0


def validated(document: Document) -> Spec:
    """The spec that a document holds.

    Raises:
        SpecError: it has problems; the error carries all of them.
    """
    kind = document.data.get("kind")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise SpecError([text for _, text in document.problems] + [_kind_problem(document)])
    try:
        spec = model.model_validate(document.data)
    except ValidationError as error:
        problems = problems_of(error, model=model)
    else:
        problems = list(truth_values(document.data, taken=spec.model_dump()))
        if not (problems or document.problems):
            return spec
    second: list[Problem] = []
    try:
        # Once more with the unknown fields renamed or removed: cross-field rules are only checked on known ones.
        model.model_validate(without_unknown(document.data, problems))
    except ValidationError as error:
        second = problems_of(error, model=model)
    raise SpecError(_told(document, _merged(problems, second)))


def _kind_problem(document: Document) -> str:
    place, choices = document.place(("kind",)), ", ".join(KINDS)
    if "kind" not in document.data:
        return f"{document.name}:1: kind is required, one of {choices}"
    kind = document.data["kind"]
    return f"{place}: kind must be one of {choices}, got {quoted(kind)}{closest(str(kind), list(KINDS))}"


def _merged(first: list[Problem], second: list[Problem]) -> list[Problem]:
    suggested = {problem.renamed for problem in first if problem.renamed}
    kept = [problem for problem in first if not (problem.is_missing and problem.path in suggested)]
    known = {(problem.path, problem.message) for problem in first}
    return kept + [problem for problem in second if (problem.path, problem.message) not in known]


def _told(document: Document, problems: list[Problem]) -> list[str]:
    told = list(document.problems)
    for problem in problems:
        place = document.place(problem.path[:-1] if problem.is_missing else _mentioned(document, problem))
        line = place.rpartition(":")[2]
        told.append((0 if place.startswith("--set") else int(line), f"{place}: {problem.message}"))
    return [text for _, text in sorted(told, key=lambda pair: pair[0])]


def _mentioned(document: Document, problem: Problem) -> KeyPath:
    """Path of the field that a cross-field message begins with, where the spec has it; else the problem's own."""
    words: KeyPath = tuple(problem.message.split(" ", 1)[0].rstrip(":").split("."))
    return words if words in document.place_of else problem.path
