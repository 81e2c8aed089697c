"""A file of a folder that cannot be read: evidence tells a reject from a failing disk, mount or process."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ImageFolderConfig, S3Config
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.sources.plan import WorkUnit
from pipeline.storage import StorageUnavailableError

MOUNT_ERRORS = [errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ETIMEDOUT]
SHORTAGES = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN]
FILE_ERRORS = [errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[int]]], None]:
    """Make the kernel answer opens of files by name with these errors, one after the other, the last one for ever."""
    real_open = os.open

    def start(errors_of: dict[str, list[int]]) -> None:
        def open_or_fail(path: Any, *args: Any, **kwargs: Any) -> int:
            errors = errors_of.get(Path(os.fspath(path)).name, errors_of.get("*", [0]))
            number = errors.pop(0) if len(errors) > 1 else errors[0]
            if number:
                raise OSError(number, os.strerror(number), path)
            return real_open(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", open_or_fail)

    return start


def unit_of(root: Path, *, num_images: int = 4) -> tuple[ImageFolderSource, WorkUnit]:
    (root / "a").mkdir(parents=True)
    for number in range(num_images):
        (root / "a" / f"{number:03d}.png").write_bytes(b"%d" % number)
    source = ImageFolderSource(ImageFolderConfig(kind="image_folder", root=str(root)), s3=S3Config())
    (unit,) = source.plan().units
    return source, unit


def read(source: ImageFolderSource, unit: WorkUnit) -> list[tuple[bytes, str]]:
    """Of each sample what was read of it, and reason and detail of what is wrong with it."""
    return [
        (sample.data, "" if sample.problem is None else f"{sample.problem.reason}: {sample.problem.detail}")
        for sample in source.read(unit)
    ]


@pytest.mark.parametrize("number", FILE_ERRORS)
@pytest.mark.parametrize("name", ["000.png", "003.png"])
def test_one_file_that_fails_for_good_is_a_reject(tmp_path: Path, fail: Any, name: str, number: int) -> None:
    source, unit = unit_of(tmp_path)
    fail({name: [number]})
    rejected = (b"", f"unreadable: {os.strerror(number)}")
    assert read(source, unit) == [rejected if name == f"{index:03d}.png" else (b"%d" % index, "") for index in range(4)]


@pytest.mark.parametrize("number", [*FILE_ERRORS, *SHORTAGES])
def test_a_file_that_fails_once_is_read(tmp_path: Path, fail: Any, number: int) -> None:
    source, unit = unit_of(tmp_path)
    fail({"001.png": [number, 0]})
    assert read(source, unit) == [(b"%d" % index, "") for index in range(4)]


@pytest.mark.parametrize("number", FILE_ERRORS)
@pytest.mark.parametrize("num_images", [1, 4, 100])
def test_where_no_file_can_be_read_the_storage_fails(tmp_path: Path, fail: Any, num_images: int, number: int) -> None:
    source, unit = unit_of(tmp_path / "tree", num_images=num_images)
    (tmp_path / "tree").rename(tmp_path / "gone")
    (tmp_path / "tree").mkdir()  # what a mount leaves behind
    fail({"*": [number]})
    said = f"read {tmp_path}/tree/a/000.png: where one file .* got {os.strerror(number)} and none that can; check the"
    with pytest.raises(StorageUnavailableError, match=said):
        read(source, unit)


def test_a_mount_that_comes_back_has_cost_no_sample(tmp_path: Path) -> None:
    source, unit = unit_of(tmp_path / "tree")
    samples = source.read(unit)
    assert next(samples).data == b"0"
    (tmp_path / "tree").rename(tmp_path / "gone")
    with pytest.raises(StorageUnavailableError, match=r"tree/a/001\.png: .* got No such file or directory"):
        next(samples)
    (tmp_path / "gone").rename(tmp_path / "tree")
    assert read(source, unit) == [(b"%d" % index, "") for index in range(4)]


def test_of_a_lone_file_the_root_is_the_witness(tmp_path: Path) -> None:
    source, unit = unit_of(tmp_path / "tree", num_images=1)
    (tmp_path / "tree" / "a" / "000.png").unlink()
    assert read(source, unit) == [(b"", "unreadable: No such file or directory")]
    (tmp_path / "tree" / "a").rmdir()
    with pytest.raises(StorageUnavailableError, match=r"tree/a/000\.png"):
        read(source, unit)


@pytest.mark.parametrize("number", MOUNT_ERRORS)
def test_an_error_of_the_mount_is_no_files(tmp_path: Path, fail: Any, number: int) -> None:
    source, unit = unit_of(tmp_path)
    fail({"001.png": [number]})
    with pytest.raises(
        StorageUnavailableError, match=f"001.png: the file system must answer, got {os.strerror(number)}"
    ):
        read(source, unit)
    fail({"001.png": [errno.EIO], "002.png": [number]})
    with pytest.raises(StorageUnavailableError, match=r"002\.png"):
        read(source, unit)


@pytest.mark.parametrize("number", SHORTAGES)
def test_a_lack_of_memory_or_descriptors_is_an_error_of_the_attempt(tmp_path: Path, fail: Any, number: int) -> None:
    source, unit = unit_of(tmp_path)
    for errors_of in ({"001.png": [number]}, {"001.png": [errno.ENOENT], "002.png": [number]}):
        fail(errors_of)
        with pytest.raises(OSError, match=r"00[12]\.png") as caught:
            read(source, unit)
        assert caught.value.errno == number


def test_a_file_that_fails_each_time_in_another_way_is_no_reject(tmp_path: Path, fail: Any) -> None:
    source, unit = unit_of(tmp_path)
    fail({"001.png": [errno.EACCES, errno.ENOENT]})
    with pytest.raises(FileNotFoundError, match=r"001\.png"):
        read(source, unit)


def test_a_lost_run_of_files_is_rejected_beside_others(tmp_path: Path) -> None:
    source, unit = unit_of(tmp_path, num_images=90)
    for index in range(60):
        (tmp_path / "a" / f"{index:03d}.png").unlink()
    lost = (b"", "unreadable: No such file or directory")
    assert read(source, unit) == [lost] * 60 + [(b"%d" % index, "") for index in range(60, 90)]


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "fifo.png")
    (tmp_path / "a" / "device.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a/socket.png")
    (tmp_path / "a" / "z.png").write_bytes(b"z")
    source = ImageFolderSource(ImageFolderConfig(kind="image_folder", root=str(tmp_path)), s3=S3Config())
    (unit,) = source.plan().units
    refused = (b"", "unreadable: not a regular file")
    unopened = (b"", f"unreadable: {os.strerror(errno.ENXIO)}")
    assert read(source, unit) == [refused, refused, unopened, (b"z", "")]
