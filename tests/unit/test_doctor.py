"""The checks of this machine: one that cannot find its answer is a line of the table like any other."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from jobs.doctor import _checks, _guarded


def test_a_check_that_fails_itself_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> NoReturn:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", fail)
    found = _guarded("memory", _checks(tmp_path)["memory"])
    assert (found.name, found.status, found.found) == (
        "memory",
        "fail",
        "ValueError: unrecognized configuration name",
    )
