"""What `tokenize` writes, read by the packages that others read shards with; no pass over the data comes before."""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import wids
from interop_sets import make_gapped_set, make_mixed_set, tars_of, tokenized, written
from PIL import Image
from toy_corpus import png, tokenize_config, tokenize_here, write_folder

from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, S3Config
from pipeline.export import export_llamagen
from pipeline.storage import ArtifactError, open_storage
from pipeline.tokenize import run_tokenize
from tokenization.config import VQConfig
from tokenization.weights_file import write_weights

ORACLES = Path(__file__).parents[1] / "oracles"
SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""webdataset's rule, which Energon, Hugging Face and Ray copied."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interop")


@pytest.fixture(scope="module")
def shard_set(root: Path) -> Path:
    return make_gapped_set(root)


@pytest.fixture(scope="module")
def mixed_set(root: Path) -> Path:
    return make_mixed_set(root)


def as_written(samples: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Samples that a reader yields in the form of `written`; no key may come twice."""
    read = [(sample["__key__"], (np.asarray(sample["codes.npy"]).tolist(), sample["json"])) for sample in samples]
    assert len(dict(read)) == len(read)
    return dict(read)


@pytest.fixture(scope="module", params=["tars", "folder"])
def names_of_shard(root: Path, shard_set: Path, request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Member names of each shard, by plain tarfile; of a folder whose names break every rule, too."""
    run_dir = shard_set
    if request.param == "folder":
        tree = write_folder(root / "tree", classes=("A.b", "__meta__", "\u00e9t\u00e9"), images_per_class=4)
        (tree / "A.b" / f"{'long' * 50}.PNG").write_bytes(png(1))
        source = {"kind": "image_folder", "root": str(tree), "samples_per_unit": 5}
        run_dir = tokenized(root, "folder", source)
    shards = {}
    for path in sorted(run_dir.glob("shards/*.tar")):
        with tarfile.open(path, "r:") as tar:
            shards[path.name] = tar.getnames()
    return shards


class TestNames:
    """The rules of `docs/formats.md` that all readers lean on."""

    def test_each_name_splits_into_a_key_of_digits_and_a_lower_case_extension(
        self, names_of_shard: dict[str, list[str]]
    ) -> None:
        for name in chain.from_iterable(names_of_shard.values()):
            match = SAMPLE_NAME.fullmatch(name)
            assert match is not None
            assert re.fullmatch(r"[0-9]+", match[1])
            assert match[2] in ("codes.npy", "json")
            assert len(name) <= 100

    def test_members_of_a_sample_stand_together_and_keys_are_unique_over_the_set(
        self, names_of_shard: dict[str, list[str]]
    ) -> None:
        names = list(chain.from_iterable(names_of_shard.values()))
        keys = [name.partition(".")[0] for name in names]
        assert keys[::2] == keys[1::2]
        assert keys[::2] == sorted(set(keys))
        assert [name.partition(".")[2] for name in names] == ["codes.npy", "json"] * (len(names) // 2)

    def test_no_shard_is_empty_and_their_names_have_five_digits(self, names_of_shard: dict[str, list[str]]) -> None:
        assert all(names_of_shard.values())
        assert all(re.fullmatch(r"[0-9]{5}\.tar", name) for name in names_of_shard)


class TestWebDataset:
    def test_all_samples_come_in_order(self, shard_set: Path) -> None:
        samples = list(webdataset.WebDataset(tars_of(shard_set), shardshuffle=False).decode())
        assert as_written(iter(samples)) == written(shard_set)
        assert [sample["__key__"] for sample in samples] == list(written(shard_set))
        assert samples[0]["codes.npy"].dtype == np.uint16

    def test_two_loader_workers_read_each_sample_once(self, shard_set: Path) -> None:
        dataset = webdataset.WebDataset(tars_of(shard_set), shardshuffle=False).decode()
        loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=2)
        assert as_written(iter(loader)) == written(shard_set)

    def test_wids_reads_any_sample_by_its_index(self, shard_set: Path, tmp_path: Path) -> None:
        index = str(shard_set / "shardindex.json")
        dataset = wids.ShardListDataset(index, cache_dir=str(tmp_path / "cache"), keep=True)
        keys = list(written(shard_set))
        assert len(dataset) == 18
        for position in (17, 0, 11, 12):
            sample = dataset[position]
            codes, metadata = written(shard_set)[keys[position]]
            assert sample["__key__"] == keys[position]
            assert sample[".codes.npy"].tolist() == codes
            assert sample[".json"] == metadata


class TestHuggingFace:
    @pytest.mark.parametrize("streaming", [True, False])
    def test_load_dataset_reads_all_samples(self, shard_set: Path, tmp_path: Path, *, streaming: bool) -> None:
        import datasets

        loaded = datasets.load_dataset(
            "webdataset",
            data_files={"train": f"{shard_set}/shards/*.tar"},
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path),
        )
        assert as_written(iter(loaded)) == written(shard_set)
        assert loaded.features["codes.npy"] == datasets.List(datasets.List(datasets.Value("uint16")))

    @pytest.mark.parametrize("streaming", [True, False])
    def test_metadata_that_differs_between_samples_is_read_with_the_json_feature(
        self, mixed_set: Path, tmp_path: Path, *, streaming: bool
    ) -> None:
        from datasets import Features, Json, List, Value, load_dataset

        text = Value("string")
        loaded = load_dataset(
            "webdataset",
            data_files={"train": f"{mixed_set}/shards/*.tar"},
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path),
            features=Features(
                {"codes.npy": List(List(Value("uint16"))), "json": Json(), "__key__": text, "__url__": text}
            ),
        )
        assert as_written(iter(loaded)) == written(mixed_set)


def test_ray_data_reads_all_samples(shard_set: Path, mixed_set: Path) -> None:
    import ray

    with ray_session(ClusterConfig(num_workers=2)):
        for run_dir in (shard_set, mixed_set):
            dataset = ray.data.read_webdataset(f"{run_dir}/shards", file_extensions=["tar"])
            assert as_written(iter(dataset.take_all())) == written(run_dir)


@pytest.mark.parametrize(
    ("oracle", "views", "folder"),
    [
        ("tencrop110", {"kind": "ten_crop", "crop_range": 1.1}, "code_c2i_flip_ten_crop"),
        ("tencrop105", {"kind": "ten_crop", "crop_range": 1.05}, "code_c2i_flip_ten_crop_105"),
        ("flip", {"kind": "flip"}, "code_c2i_flip"),
    ],
)
def test_exported_codes_are_those_of_llamagens_own_script(
    tmp_path: Path, oracle: str, views: dict[str, Any], folder: str
) -> None:
    codes, images = np.load(ORACLES / "llamagen_extract_codes.npz"), np.load(ORACLES / "center_crop_arr.npz")
    network = VQConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1, 2, 2), z_channels=32)
    state = torch.load(ORACLES / "llamagen_vq_tiny_ds8.pt", weights_only=True)["state_dict"]
    write_weights(tmp_path / "vq.safetensors", network=network, state=state, metadata={})
    for number in range(3):
        class_dir = tmp_path / "tree" / f"class{number}"
        class_dir.mkdir(parents=True)
        Image.fromarray(images[f"in{number}"]).save(class_dir / "0.png")
    config = tokenize_config(
        tmp_path / "set",
        source={"kind": "image_folder", "root": str(tmp_path / "tree")},
        weights=tmp_path / "vq.safetensors",
        views=views,
        tokenizer={"weights": str(tmp_path / "vq.safetensors"), "image_size_px": 32, "batch_size": 8},
    )
    tokenize_here(config)
    done = export_llamagen(open_storage(config.run_dir), output=str(tmp_path / "out"), s3=S3Config())
    assert done.code_path == str(tmp_path / "out" / folder)
    for number in range(3):
        exported = np.load(f"{done.code_path}/imagenet32_codes/{number}.npy")
        assert exported.dtype == np.int64
        np.testing.assert_array_equal(exported, codes[f"img{number}_{oracle}_codes"])
        assert np.load(f"{done.code_path}/imagenet32_labels/{number}.npy").tolist() == [number]


def test_sidecars_are_the_same_bytes_in_every_run(root: Path, shard_set: Path) -> None:
    source = {"kind": "webdataset", "urls": [f"{root}/tars/{{00000..00003}}.tar"]}
    again = tokenized(root, "again", source)
    for name in (".nv-meta/.info.json", ".nv-meta/split.yaml", ".nv-meta/dataset.yaml", "shardindex.json"):
        assert (again / name).read_bytes() == (shard_set / name).read_bytes()
    assert json.loads((again / "shardindex.json").read_bytes())["shardlist"][2]["url"] == "shards/00003.tar"


def test_a_set_that_is_being_mended_has_no_sidecars(tmp_path: Path) -> None:
    run_dir = make_gapped_set(tmp_path)
    (run_dir / "shards" / "00003.tar").unlink()
    torn = tmp_path / "tars" / "00003.tar"
    whole = torn.read_bytes()
    torn.write_bytes(whole[: 6 * 512] + b"x" * (len(whole) - 6 * 512))
    source = {"kind": "webdataset", "urls": [f"{tmp_path}/tars/{{00000..00003}}.tar"]}
    config = tokenize_config(run_dir, source=source, weights=tmp_path / "tiny.safetensors", max_rejected_fraction=1)
    with pytest.raises(ArtifactError):
        run_tokenize(config, progress=False)
    assert [path.name for path in (run_dir / ".nv-meta").iterdir()] == []
    assert not (run_dir / "shardindex.json").exists()
