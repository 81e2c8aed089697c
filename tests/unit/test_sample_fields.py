"""What a corpus says of a sample: usable as it is, or a reason; and the digest that sees all of it."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pipeline.sources.fields import checked_label, parse_caption, parse_json, parse_label, printable
from pipeline.sources.sample import InputSample, Problem, UnusableSampleError, content_digest


@pytest.mark.parametrize(
    "text",
    ["1e999", "[-1e400]", "NaN", '{"a": Infinity}', '{"a": 1e999}', '"text"', "", "[" * 100_000, '{"a": "\\ud800"}'],
)
def test_what_json_cannot_carry_on_is_refused(text: str) -> None:
    with pytest.raises(UnusableSampleError) as caught:
        parse_json(text.encode())
    assert caught.value.problem.reason == "bad_json"


def test_json_of_any_honest_kind_is_kept(tmp_path: object) -> None:
    fields = {"a": [1, 2.5, -1e300, True, None], "b": {"c": "\u00e9\U0001f600"}, "big": 2**70}
    for escaped in (True, False):
        data = json.dumps(fields, ensure_ascii=escaped).encode()
        assert parse_json(data) == parse_json(b"\xef\xbb\xbf" + data) == fields


def test_captions_lose_the_mark_and_the_white_space_around_them() -> None:
    assert parse_caption(b"\xef\xbb\xbf a  cat\r\n") == "a  cat"


@pytest.mark.parametrize(("data", "label"), [(b"5", 5), (b" 007\n", 7), (b"2147483647", 2147483647)])
def test_labels_are_plain_digits(data: bytes, label: int) -> None:
    assert checked_label(parse_label(data), num_classes=None) == label


@pytest.mark.parametrize("data", [b"", b"-1", b"+1", b"1_0", b"1.0", b"x", b"\xff", b"2147483648", b"9" * 5000])
def test_other_labels_are_refused(data: bytes) -> None:
    with pytest.raises(UnusableSampleError) as caught:
        checked_label(parse_label(data), num_classes=None)
    assert caught.value.problem.reason == "bad_label"


def test_names_become_text_that_utf8_can_hold() -> None:
    assert printable("caf\udce9") == "caf\\xe9"
    assert printable("caf\u00e9") == "caf\u00e9"


SAMPLE = InputSample(position=1, source="a", data=b"data", caption="c", label=1, extra={"x": 1, "y": ["z"]})


@pytest.mark.parametrize(
    "change",
    [
        {"position": 2},
        {"source": "b"},
        {"data": b"datb"},
        {"caption": None},
        {"caption": "None"},
        {"label": None},
        {"extra": {"x": 1.0, "y": ["z"]}},
        {"extra": {"x": True, "y": ["z"]}},
        {"extra": {"x": "1", "y": ["z"]}},
        {"extra": {"x": 1, "y": "['z']"}},
        {"extra": {}},
        {"problem": Problem(stage="read", reason="bad_json")},
    ],
    ids=str,
)
def test_the_digest_sees_every_field(change: dict[str, Any]) -> None:
    assert content_digest([SAMPLE]) != content_digest([replace(SAMPLE, **change)])


def test_the_digest_sees_where_samples_and_fields_end() -> None:
    assert content_digest([SAMPLE, SAMPLE]) != content_digest([replace(SAMPLE, data=b"datadata")])
    one = replace(SAMPLE, source="ab", caption="c")
    assert content_digest([one]) != content_digest([replace(one, source="a", caption="bc")])
    assert content_digest([SAMPLE]) == content_digest([replace(SAMPLE)])


def test_the_digest_is_the_same_in_every_process_and_takes_any_text() -> None:
    odd = replace(SAMPLE, source="\u00e9\U0001f600\udcff", extra={"f": 0.1 + 0.2, "n": math.pi})
    assert content_digest([odd]) == "fa657c4e978e23627ac40b97eb7b778470a318b1599d825517bde7379e6d7c91"
