"""Labels found by the scan are those of the JSON parser, whatever else the JSON holds."""

import json
import random
from typing import Any

import numpy as np
import pytest

from pipeline.sample_labels import find_labels
from pipeline.shards import canonical_json

WIDTH = 1024

ANSWERED = [
    {"label": 0},
    {"label": None},
    {"caption": None, "label": 7},
    {"caption": 'a "label":3, of, {"label":4} and \\"label\\":5,', "label": 6},
    {"caption": "\\", "label": 1},
    {"caption": 'ends in a quote"', "label": 2},
    {"caption": "line\nbreak\ttab \u0001 \u00e9\u4e2d\U0001f600", "label": 3},
    {"caption": "[{", "extra": {"label": 9, "deep": {"label": [1, {"label": 2}]}}, "height": 1, "label": 4},
    {"extra": [], "label": 5},
    {"extra": {}, "height": -1.5e-7, "label": 10**17, "source": {"label": 1}, "views": [{"label": 2}]},
    {"a": True, "b": False, "label": 8, "zz": "\n\\n"},
]
LEFT_ALONE: list[Any] = [
    {},
    {"caption": "no label"},
    {"extra": {"label": 3}},
    {"label": -1},
    {"label": 1.0},
    {"label": True},
    {"label": "3"},
    {"label": 10**19},
    {"label": [3]},
    {"extra": [[[[[[[[1]]]]]]]], "label": 3},
    [{"label": 3}],
    "label",
    3,
]


def found(texts: list[bytes], *, width: int = WIDTH) -> list[int | None]:
    """The label of each text, None where it was not answered."""
    text_BN = np.zeros((len(texts), width), dtype=np.uint8)
    for row, text in zip(text_BN, texts, strict=True):
        row[: len(text)] = np.frombuffer(text[:width], dtype=np.uint8)
    sizes_B = np.array([len(text) for text in texts])
    labels_B, is_answered_B = find_labels(text_BN, sizes_B=sizes_B, is_read_B=np.ones(len(texts), dtype=bool))
    return [label if ok else None for label, ok in zip(labels_B.tolist(), is_answered_B.tolist(), strict=True)]


@pytest.mark.parametrize("value", ANSWERED)
def test_label_is_that_of_the_outermost_object(value: dict[str, Any]) -> None:
    label = -1 if value["label"] is None else value["label"]
    assert found([canonical_json(value)]) == [label]


@pytest.mark.parametrize("value", LEFT_ALONE)
def test_anything_but_a_whole_number_is_left_to_the_parser(value: Any) -> None:
    assert found([canonical_json(value)]) == [None]


def test_one_that_is_left_alone_does_not_disturb_the_others() -> None:
    texts = [canonical_json(value) for value in [*ANSWERED, *LEFT_ALONE, *ANSWERED]]
    labels = [-1 if value["label"] is None else value["label"] for value in ANSWERED]
    assert found(texts) == [*labels, *[None] * len(LEFT_ALONE), *labels]


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"label":3', b'{"label":3}\n{"label":4}', b' {"label":3}', b'{"label":3}\0}', b'{"label":03}', b"\n"],
)
def test_text_that_is_not_as_the_writer_writes_it_is_left_alone(text: bytes) -> None:
    assert found([b'{"label":1}', text, b'{"label":2}']) == [1, None, 2]


def test_a_text_of_two_lines_does_not_stand_for_another_text() -> None:
    assert found([b'{"label":3}\n{"label":4}', b'{"caption":"no label"}', b'{"label":5}']) == [None, None, 5]


def test_text_that_fills_its_room_or_does_not_fit_it() -> None:
    text = b'{"caption":"a picture","label":3}'
    assert found([text], width=len(text)) == [3]
    assert found([text, text], width=len(text) + 1) == [3, 3]
    assert found([text], width=len(text) - 1) == [None]


def random_value(draws: random.Random, depth: int) -> Any:
    kind = draws.randrange(8 if depth else 5)
    if kind == 0:
        return draws.choice([None, True, False, 0, -3, 17, 2.5, 1e-9])
    if kind <= 4:
        return "".join(draws.choice('"\\{}[]:,\n label é"') for _ in range(draws.randrange(12)))
    if kind == 5:
        return [random_value(draws, depth - 1) for _ in range(draws.randrange(3))]
    return {draws.choice(["a", "label", '"label"', "}"]): random_value(draws, depth - 1) for _ in range(2)}


def test_random_objects_read_as_by_the_parser() -> None:
    draws = random.Random(0)
    values = [{"caption": random_value(draws, 3), "extra": random_value(draws, 3)} for _ in range(2000)]
    for number, value in enumerate(values):
        value["label"] = number
        value["source"] = random_value(draws, 2)
    texts = [canonical_json(value) for value in values]
    assert [json.loads(text)["label"] for text in texts] == list(range(2000))
    assert found(texts, width=4096) == list(range(2000))
