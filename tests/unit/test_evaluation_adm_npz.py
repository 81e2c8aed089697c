"""ADM's file layout: what numpy sees in a written file, and what is refused in a read one."""

from pathlib import Path

import numpy as np
import pytest

from training.evaluation.adm_npz import read_adm_moments, read_adm_npz, write_adm_npz


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)


def test_written_images_are_what_adms_evaluator_reads(tmp_path: Path) -> None:
    write_adm_npz(tmp_path / "samples_4x8x6x3.npz", iter([pictures()[:3], pictures()[3:]]), num_images=4)
    with np.load(tmp_path / "samples_4x8x6x3.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pictures())
    assert np.array_equal(read_adm_npz(tmp_path / "samples_4x8x6x3.npz"), pictures())
    assert [path.name for path in tmp_path.iterdir()] == ["samples_4x8x6x3.npz"]


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3)), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_only_rgb_images_are_written_and_read(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"writing .*arr_0 must be uint8 images of shape \(N, H, W, 3\)"):
        write_adm_npz(tmp_path / "a.npz", [images], num_images=2)
    np.savez(tmp_path / "b.npz", images)
    with pytest.raises(ValueError, match=r"reading .*arr_0 must be uint8 images of shape \(N, H, W, 3\)"):
        read_adm_npz(tmp_path / "b.npz")


def test_images_that_do_not_make_one_array_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have the shape of the first, \(8, 6, 3\), got \(6, 8, 3\)"):
        write_adm_npz(tmp_path / "a.npz", [pictures(), pictures().transpose(0, 2, 1, 3)], num_images=8)
    with pytest.raises(ValueError, match="must hold num_images = 5 images, got 4"):
        write_adm_npz(tmp_path / "a.npz", [pictures()], num_images=5)
    with pytest.raises(ValueError, match="must hold num_images = 0 images, got 0"):
        write_adm_npz(tmp_path / "a.npz", [], num_images=0)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an npz file, got no file"):
        read_adm_npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match="must be an npz file"):
        read_adm_npz(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", pictures())
    with pytest.raises(ValueError, match="must be an npz file"):
        read_adm_npz(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", codes=pictures())
    with pytest.raises(ValueError, match="must have an array arr_0, got codes"):
        read_adm_npz(tmp_path / "other.npz")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_adm_npz(tmp_path / "a.npz", [pictures()], num_images=4)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="must be an npz file"):
        read_adm_npz(tmp_path / "a.npz")


def test_a_file_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    write_adm_npz(tmp_path / "a.npz", [pictures()], num_images=4)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="must be a whole array of numbers, got BadZipFile"):
        read_adm_npz(tmp_path / "a.npz")


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"must be a whole array of numbers, got .*allow_pickle=False"):
        read_adm_npz(tmp_path / "a.npz")


def test_reference_moments_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.arange(3.0), sigma=np.eye(3) * 2)
    moments = read_adm_moments(tmp_path / "reference.npz")
    assert moments.mean_F.tolist() == [0, 1, 2]
    assert moments.covariance_FF.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    np.savez(tmp_path / "reference.npz", mu=np.arange(3.0), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"mu must be \(F,\) and sigma \(F, F\)"):
        read_adm_moments(tmp_path / "reference.npz")
