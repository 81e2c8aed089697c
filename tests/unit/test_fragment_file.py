"""A rank's file of a checkpoint: what is written is read, by us and by safetensors; holes and overlaps are named."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.local_storage import LocalStorage, sha256_of_file
from pipeline.storage import ArtifactError
from training.fragment_file import FragmentFile, FragmentLayout, check_coverage, write_fragments

LAYOUT = FragmentLayout(kinds=("weights", "ema"), fragments={"a.weight": (3, 8), "b": (0, 2)})
DATA = np.arange(14, dtype=np.float32)


def test_each_kind_is_read_back_with_its_starts(tmp_path: Path) -> None:
    written = write_fragments(tmp_path / "f.safetensors", LAYOUT, [DATA[:4], DATA[4:]])
    assert written.num_bytes == (tmp_path / "f.safetensors").stat().st_size
    assert written.sha256 == sha256_of_file(tmp_path / "f.safetensors")
    file = FragmentFile(LocalStorage(tmp_path), "f.safetensors")
    assert file.layout == LAYOUT
    found = {
        kind: {name: (start, values.tolist()) for name, (start, values) in file.read(kind).items()}
        for kind in LAYOUT.kinds
    }
    assert found == {
        "weights": {"a.weight": (3, [0, 1, 2, 3, 4]), "b": (0, [5, 6])},
        "ema": {"a.weight": (3, [7, 8, 9, 10, 11]), "b": (0, [12, 13])},
    }


def test_safetensors_reads_it_too(tmp_path: Path) -> None:
    write_fragments(tmp_path / "f.safetensors", LAYOUT, [DATA])
    found = {name: values.tolist() for name, values in load_file(tmp_path / "f.safetensors").items()}
    assert found == {
        "weights/a.weight": [0, 1, 2, 3, 4],
        "weights/b": [5, 6],
        "ema/a.weight": [7, 8, 9, 10, 11],
        "ema/b": [12, 13],
    }


def test_a_rank_that_holds_nothing_writes_a_file_too(tmp_path: Path) -> None:
    empty = FragmentLayout(kinds=("weights",), fragments={})
    write_fragments(tmp_path / "f.safetensors", empty, [np.empty(0, np.float32)])
    assert FragmentFile(LocalStorage(tmp_path), "f.safetensors").layout == empty
    assert load_file(tmp_path / "f.safetensors") == {}


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 100])
def test_another_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"read .*f\.safetensors: it must be a rank's file of a checkpoint"):
        FragmentFile(LocalStorage(tmp_path), "f.safetensors")


def test_a_safetensors_file_of_others_is_named(tmp_path: Path) -> None:
    save_file({"x": DATA}, tmp_path / "f.safetensors")
    with pytest.raises(ArtifactError, match="it must be a rank's file"):
        FragmentFile(LocalStorage(tmp_path), "f.safetensors")


def test_coverage_is_what_counting_every_element_says() -> None:
    intervals = [(start, end) for start in range(4) for end in range(start + 1, 5)]
    for number in range(4):
        for chosen in itertools.combinations_with_replacement(intervals, number):
            counts = [sum(start <= element < end for start, end in chosen) for element in range(4)]
            layouts = [FragmentLayout(kinds=("weights",), fragments={"a": interval}) for interval in chosen]
            is_covered = True
            try:
                check_coverage({"a": (2, 2)}, layouts, doing="save")
            except ArtifactError:
                is_covered = False
            assert is_covered == (counts == [1, 1, 1, 1]), chosen


def test_ranks_that_keep_other_states_are_refused() -> None:
    layouts = [
        FragmentLayout(kinds=("weights", *extra), fragments={"a": (index, index + 1)})
        for index, extra in enumerate([(), ("ema",)])
    ]
    with pytest.raises(ArtifactError, match="all ranks must hold the same states"):
        check_coverage({"a": (2,)}, layouts, doing="save")


def test_the_layout_is_json_in_the_files_metadata(tmp_path: Path) -> None:
    write_fragments(tmp_path / "f.safetensors", LAYOUT, [DATA])
    data = (tmp_path / "f.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["tensorar"]) == {
        "kinds": ["weights", "ema"],
        "fragments": {"a.weight": [3, 8], "b": [0, 2]},
    }
