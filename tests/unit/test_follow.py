"""Live progress of a run that is started again: its metrics are cut and written anew under the reader's eyes."""

import json
from pathlib import Path

from training.follow import _Tail


def test_lines_are_read_whole_though_a_restart_cut_the_file_and_wrote_past_the_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = _Tail(path)
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 10)))
    assert [line["step"] for line in tail.read()] == list(range(1, 10))
    for extra in range(30):  # every alignment of the old place to the new lines
        path.write_text("".join(json.dumps({"step": step, "x": "y" * extra}) + "\n" for step in range(5, 20)))
        tail.read()
    with path.open("a") as file:
        file.write(json.dumps({"step": 20}) + "\n" + '{"step": 2')
        file.flush()
        assert tail.read() == [{"step": 20}]
        file.write("1}\n")
        file.flush()
        assert tail.read() == [{"step": 21}]
