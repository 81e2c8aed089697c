"""The state of a tokenize job: read from files that may be damaged, written where the storage may fail."""

import json
import logging
from pathlib import Path

import pytest
from test_gathered import record_of

from pipeline.gathered import Ledger
from pipeline.ledger import write_record
from pipeline.local_storage import LocalStorage
from pipeline.status import StatusFile, read_status
from pipeline.storage import ArtifactError


@pytest.mark.parametrize("text", ["[]", "null", "{}", "{", '{"num_units": null}'])
def test_status_of_a_damaged_plan_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"status of .*: it must hold the plan\.json of a tokenize job, got "):
        read_status(LocalStorage(tmp_path))


def test_a_record_that_stands_in_the_place_of_another_counts_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("plan.json", json.dumps({"num_units": 2}).encode())
    for stem in ("00000", "00001"):
        write_record(storage, stem, record_of(0))
    status = read_status(storage)
    assert (status.num_units, status.num_units_done, status.totals.num_read) == (2, 1, 5)
    assert Ledger(storage).tally().totals().num_read == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ArtifactError("a shard is damaged")])
def test_what_ends_a_job_goes_on_its_way_where_its_status_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    (tmp_path / "set").write_text("a file where the directory was")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(type(error)),
        StatusFile(LocalStorage(tmp_path / "set")),
    ):
        raise error
    assert "File exists" in caplog.text


def test_a_job_that_is_done_does_not_fail_over_its_status(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("a file where the directory was")
    with StatusFile(LocalStorage(tmp_path / "set")):
        pass
