"""The export in LlamaGen's layout, read back by the rule of its `CustomDataset`; reruns, refusals, names."""

import hashlib
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic_shards import codes_of, fingerprint_of, write_shard_set
from toy_corpus import files_of

from pipeline.config import S3Config
from pipeline.export import LlamaGenExport, code_folder, export_llamagen
from pipeline.ledger import read_manifest, write_manifest
from pipeline.storage import ArtifactError, open_storage
from tokenization.config import ViewsConfig

CENTER = ViewsConfig()
TEN_CROP = ViewsConfig(kind="ten_crop")
TEN_CROP_105 = ViewsConfig(kind="ten_crop", crop_range=1.05)
NUM_VIEWS = {"center": 1, "flip": 2, "ten_crop": 10}


def make_set(run_dir: Path, *, views: ViewsConfig = CENTER, first_sample: int = 0, **fields: object) -> Path:
    """A set of 5 samples in 2 shards; sample i has the codes `codes_of(first_sample + i)` and label (..) % 4."""
    num_views = NUM_VIEWS[views.kind]
    write_shard_set(run_dir, samples_per_shard=(3, 2), num_views=num_views, first_sample=first_sample, **fields)
    storage = open_storage(str(run_dir))
    write_manifest(storage, read_manifest(storage).model_copy(update={"views": views}))
    return run_dir


def export(run_dir: Path, output: Path) -> LlamaGenExport:
    return export_llamagen(open_storage(str(run_dir)), output=str(output), s3=S3Config())


def written_codes(sample_index: int, *, num_views: int) -> np.ndarray:
    return codes_of(sample_index, num_views=num_views, codebook_size=16, num_codes=16)


class LlamaGenReader:
    """How LlamaGen's c2i trainer reads: files by number, a sibling set every other time, a view if the path says so."""

    def __init__(self, code_path: str, *, image_size_px: int, num_files: int) -> None:
        self.dirs = [(f"{code_path}/imagenet{image_size_px}_codes", f"{code_path}/imagenet{image_size_px}_labels")]
        self.draws_view = "flip" in self.dirs[0][0]
        sibling = tuple(directory.replace("ten_crop/", "ten_crop_105/") for directory in self.dirs[0])
        if all(Path(directory).exists() for directory in sibling):
            self.dirs.append(sibling)
        self.names = [f"{number}.npy" for number in range(num_files)]

    def read(self, index: int, *, draws: random.Random) -> tuple[np.ndarray, int]:
        codes_dir, labels_dir = draws.choice(self.dirs)
        codes = np.load(f"{codes_dir}/{self.names[index]}")
        if self.draws_view:
            codes = codes[:, draws.randrange(codes.shape[1])]
        return codes.reshape(-1), int(np.load(f"{labels_dir}/{self.names[index]}").reshape(-1)[0])


def test_llamagen_reads_every_sample_in_the_order_of_the_set(tmp_path: Path) -> None:
    done = export(make_set(tmp_path / "set"), tmp_path / "out")
    reader = LlamaGenReader(done.code_path, image_size_px=done.image_size_px, num_files=done.num_samples)
    for index in range(5):
        codes, label = reader.read(index, draws=random.Random(0))
        assert codes.tolist() == written_codes(index, num_views=1)[0].tolist()
        assert label == index % 4
    assert (done.num_samples, done.codes_per_image, done.codebook_size, done.image_size_px) == (5, 16, 16, 8)


def test_llamagen_draws_every_view_of_a_flip_set(tmp_path: Path) -> None:
    done = export(make_set(tmp_path / "set", views=ViewsConfig(kind="flip")), tmp_path / "out")
    reader = LlamaGenReader(done.code_path, image_size_px=8, num_files=5)
    draws = random.Random(0)
    drawn = {tuple(reader.read(3, draws=draws)[0]) for _ in range(50)}
    assert drawn == {tuple(view) for view in written_codes(3, num_views=2)}


def test_llamagen_finds_both_sets_of_crops_below_one_output(tmp_path: Path) -> None:
    done = export(make_set(tmp_path / "110", views=TEN_CROP), tmp_path / "out")
    export(make_set(tmp_path / "105", views=TEN_CROP_105, first_sample=100), tmp_path / "out")
    reader = LlamaGenReader(done.code_path, image_size_px=8, num_files=5)
    draws = random.Random(0)
    drawn = {tuple(reader.read(2, draws=draws)[0]) for _ in range(400)}
    assert drawn == {tuple(view) for first in (0, 100) for view in written_codes(first + 2, num_views=10)}


def test_files_are_what_numpy_saves_as_int64(tmp_path: Path) -> None:
    code_path = Path(export(make_set(tmp_path / "set", views=TEN_CROP), tmp_path / "out").code_path)
    saved = io.BytesIO()
    np.save(saved, written_codes(4, num_views=10)[None].astype(np.int64))
    assert (code_path / "imagenet8_codes" / "4.npy").read_bytes() == saved.getvalue()
    label = np.load(code_path / "imagenet8_labels" / "3.npy")
    assert (label.dtype, label.shape, label[0]) == (np.int64, (1,), 3)
    names = sorted(path.relative_to(code_path).as_posix() for path in code_path.rglob("*.npy"))
    assert names == [f"imagenet8_{kind}/{index}.npy" for kind in ("codes", "labels") for index in range(5)]


@pytest.mark.parametrize(
    ("views", "name"),
    [
        (CENTER, "code_c2i"),
        (ViewsConfig(kind="flip"), "code_c2i_flip"),
        (TEN_CROP, "code_c2i_flip_ten_crop"),
        (TEN_CROP_105, "code_c2i_flip_ten_crop_105"),
        (ViewsConfig(kind="ten_crop", crop_range=1.25), "code_c2i_flip_ten_crop_125"),
    ],
)
def test_the_folder_name_says_what_llamagen_reads_from_it(views: ViewsConfig, name: str) -> None:
    assert code_folder(views, output="exports") == name


@pytest.mark.parametrize("output", ["exports/ten_crop", "my_ten_crop/exports"])
def test_an_output_whose_name_llamagen_would_replace_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match=r"no folder in the path of --output may end in ten_crop .*another --output"):
        code_folder(TEN_CROP, output=output)
    assert code_folder(TEN_CROP, output="ten_crops/exports") == "code_c2i_flip_ten_crop"


@pytest.mark.parametrize("label", [None, -1, "3", True])
def test_a_sample_without_a_class_label_is_refused_before_a_file_is_written(tmp_path: Path, label: object) -> None:
    run_dir = make_set(tmp_path / "set", label=label)
    with pytest.raises(ArtifactError, match=rf"sample 000000000 .*00000\.tar: .*of every sample, got {label!r}; give"):
        export(run_dir, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.npy")) == []


def test_a_rerun_writes_only_what_is_missing(tmp_path: Path) -> None:
    run_dir = make_set(tmp_path / "set")
    (run_dir / "shards" / "00001.tar").rename(tmp_path / "away.tar")
    with pytest.raises(ArtifactError, match=r"open shard .*00001\.tar"):
        export(run_dir, tmp_path / "out")
    code_path = tmp_path / "out" / "code_c2i"
    done_before = {path: path.stat().st_mtime_ns for path in code_path.rglob("*.npy")}
    assert len(done_before) == 6
    (code_path / "imagenet8_codes" / ".staged-3.npy-1-dead").write_bytes(b"half")
    shutil.move(tmp_path / "away.tar", run_dir / "shards" / "00001.tar")
    export(run_dir, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in done_before} == done_before
    export(run_dir, tmp_path / "clean")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_a_finished_export_is_left_as_it_is(tmp_path: Path) -> None:
    run_dir = make_set(tmp_path / "set")
    first = export(run_dir, tmp_path / "out")
    shutil.rmtree(run_dir / "shards")
    assert export(run_dir, tmp_path / "out") == first


@pytest.mark.parametrize("folder", ["imagenet8_codes", "imagenet8_labels"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_file_that_a_finished_export_lost_is_written_again(tmp_path: Path, folder: str, is_empty: bool) -> None:
    run_dir = make_set(tmp_path / "set")
    export(run_dir, tmp_path / "out")
    whole = files_of(tmp_path / "out")
    for index in (1, 4):
        lost = tmp_path / "out" / "code_c2i" / folder / f"{index}.npy"
        lost.unlink()
        if is_empty:
            lost.touch()
        export(run_dir, tmp_path / "out")
        assert files_of(tmp_path / "out") == whole


def test_only_the_shards_that_lost_a_file_are_read_again(tmp_path: Path) -> None:
    run_dir = make_set(tmp_path / "set")
    export(run_dir, tmp_path / "out")
    whole = files_of(tmp_path / "out")
    (run_dir / "shards" / "00000.tar").unlink()
    (tmp_path / "out" / "code_c2i" / "imagenet8_codes" / "3.npy").unlink()
    export(run_dir, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


def test_another_set_is_not_exported_into_the_same_folder(tmp_path: Path) -> None:
    export(make_set(tmp_path / "a"), tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"must speak of this set as it is now, got manifest .*another --output"):
        export(make_set(tmp_path / "b", first_sample=7), tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    export(make_set(tmp_path / "set"), tmp_path / "out")
    (tmp_path / "out" / "code_c2i" / "export.json").write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"export\.json must speak .*damaged one \(fingerprint_digest: field required\); remove"
    ):
        export(tmp_path / "set", tmp_path / "out")


def test_the_record_says_what_was_exported_and_how_far(tmp_path: Path) -> None:
    export(make_set(tmp_path / "set"), tmp_path / "out")
    manifest = (tmp_path / "set" / "manifest.json").read_bytes()
    assert json.loads((tmp_path / "out" / "code_c2i" / "export.json").read_bytes()) == {
        "version": 1,
        "layout": "llamagen",
        "fingerprint_digest": fingerprint_of().digest,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "num_shards_done": 2,
    }


def test_codes_of_another_shape_than_the_manifests_are_refused(tmp_path: Path) -> None:
    run_dir = make_set(tmp_path / "set")
    storage = open_storage(str(run_dir))
    write_manifest(storage, read_manifest(storage).model_copy(update={"codes_per_image": 64}))
    with pytest.raises(ArtifactError, match=r"codes must be \(views, T\) = \(1, 64\), got \(1, 16\); tokenize again"):
        export(run_dir, tmp_path / "out")


def test_two_exports_never_write_one_folder_at_once(tmp_path: Path) -> None:
    run_dir = make_set(tmp_path / "set")
    with (
        open_storage(str(tmp_path / "out" / "code_c2i")).exclusive(),
        pytest.raises(ArtifactError, match=r"one job at a time"),
    ):
        export(run_dir, tmp_path / "out")


def test_a_shard_with_other_samples_than_the_manifest_counts_is_refused(tmp_path: Path) -> None:
    run_dir = make_set(tmp_path / "set")
    for name in ("00000.tar", "00000.tar.idx"):
        shutil.copy(run_dir / "shards" / name.replace("00000", "00001"), run_dir / "shards" / name)
    with pytest.raises(ArtifactError, match=r"must hold the manifest's 3 samples, got 2; run tensorar verify"):
        export(run_dir, tmp_path / "out")


def test_an_unfinished_set_is_refused(tmp_path: Path) -> None:
    (make_set(tmp_path / "set") / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json: .*finish the tokenize job"):
        export(tmp_path / "set", tmp_path / "out")
