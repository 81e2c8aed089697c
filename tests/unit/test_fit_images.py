"""The images that a fit sees: every image file below the folder, once, in path order; the rest is counted."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from tokenization.fit_images import load_images


def grey(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(path)


def values_in(folder: Path) -> list[int]:
    return [int(value) for value in load_images(folder, size_px=8)[:, 0, 0, 0]]


def test_images_are_loaded_in_path_order_without_the_unusable(tmp_path: Path) -> None:
    for name, value in (("b/1.png", 100), ("a/2.png", 50), ("c.png", 150)):
        grey(tmp_path / name, value)
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    assert values_in(tmp_path) == [50, 100, 150]


def test_linked_folders_and_files_are_seen(tmp_path: Path) -> None:
    grey(tmp_path / "elsewhere" / "b" / "1.png", 100)
    grey(tmp_path / "elsewhere" / "2.png", 200)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "class").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "images" / "single.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    assert values_in(tmp_path / "images") == [100, 200]


def test_a_folder_that_links_lead_back_to_is_seen_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey(tmp_path / "a" / "1.png", 100)
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert values_in(tmp_path) == [100]
    assert "folders_linked_again=2" in caplog.text


def test_what_is_no_image_file_is_counted_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey(tmp_path / "class.png" / "1.png", 100)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "labels.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert values_in(tmp_path) == [100]
    assert f"event=passed_over folder={tmp_path} images=1 no_files=2 other_endings=2" in caplog.text


def test_nothing_is_said_of_a_folder_of_images_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey(tmp_path / "a" / "1.png", 100)
    load_images(tmp_path, size_px=8)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["1.tif", "1.TIFF", "1.ppm", "1.gif", "1.bmp", "1.webp", "1.jpeg", "1.jfif"])
def test_every_kind_that_tokenizing_reads_is_read(tmp_path: Path, name: str) -> None:
    grey(tmp_path / name, 100)
    assert values_in(tmp_path) == [100]


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey(tmp_path / "images" / "1.png", 100)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values_in(Path("~/images")) == [100]


def test_no_folder_no_image_and_a_url_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    cases = {
        str(tmp_path): "must hold at least one usable image, got none in 1 files",
        str(tmp_path / "none"): "must be a folder, got nothing there; check the path",
        str(tmp_path / "broken.png"): "must be a folder, got a file",
        "s3://bucket/images": "^loading images s3://bucket/images: .* got a URL; copy the images to a disk",
    }
    for folder, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_images(folder, size_px=8)
