"""What `tokenize` writes, read by the packages that others read shards with; no pass over the data comes before."""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from toy_corpus import (
    png,
    sample_members,
    tokenize_config,
    tokenize_here,
    write_folder,
    write_tar,
    write_tars,
    write_tiny_tokenizer,
)

from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, S3Config
from pipeline.export import export_llamagen
from pipeline.shards import read_shard
from pipeline.storage import open_storage
from tokenization.config import VQConfig
from tokenization.weights_file import write_weights

ORACLES = Path(__file__).parents[1] / "oracles"
SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""webdataset's rule, which Energon, Hugging Face and Ray copied."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interop")
    write_tiny_tokenizer(root / "tiny.safetensors")
    return root


@pytest.fixture(scope="module")
def shard_set(root: Path) -> Path:
    """Of 4 tars: 6 samples, 6 with 1 reject, none but a reject (no shard), 6; 18 written in all."""
    write_tars(root / "tars", num_tars=4, samples_per_tar=6)
    write_tar(root / "tars" / "00001.tar", [*sample_members(6), ("torn.png", png(1)[:-40]), *members_of(range(7, 12))])
    write_tar(root / "tars" / "00002.tar", [("none.png", b"")])
    return tokenized(root, "set", {"kind": "webdataset", "urls": [f"{root}/tars/{{00000..00003}}.tar"]})


@pytest.fixture(scope="module")
def mixed_set(root: Path) -> Path:
    """Six samples without caption, label or anything else, then six that have all of it."""
    bare = [(f"b{number}.png", png(number)) for number in range(6)]
    urls = [str(write_tar(root / "mixed_tars" / "0.tar", bare))]
    urls.append(str(write_tar(root / "mixed_tars" / "1.tar", members_of(range(6)))))
    return tokenized(root, "mixed", {"kind": "webdataset", "urls": urls})


def members_of(numbers: range) -> list[tuple[str, bytes]]:
    return [member for number in numbers for member in sample_members(number)]


def tokenized(root: Path, name: str, source: dict[str, Any], **fields: Any) -> Path:
    tokenize_here(tokenize_config(root / name, source=source, weights=root / "tiny.safetensors", **fields))
    return root / name


def written(run_dir: Path) -> dict[str, tuple[list[list[int]], dict[str, Any]]]:
    """Codes and metadata of every sample by its key, in order, by our own reader."""
    storage = open_storage(str(run_dir))
    names = [name for name in storage.list("shards/") if name.endswith(".tar")]
    samples = [sample for name in names for sample in read_shard(storage, name)]
    return {sample.key: (sample.codes_VT.tolist(), sample.metadata) for sample in samples}


def tars_of(run_dir: Path) -> list[str]:
    return sorted(str(path) for path in run_dir.glob("shards/*.tar"))


def as_written(samples: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Samples that a reader yields in the form of `written`; no key may come twice."""
    read = [(sample["__key__"], (np.asarray(sample["codes.npy"]).tolist(), sample["json"])) for sample in samples]
    assert len(dict(read)) == len(read)
    return dict(read)


class TestNames:
    """The rules of `docs/formats.md` that all readers lean on, held against plain tarfile."""

    @pytest.fixture(scope="class", params=["set", "folder"])
    def names_of_shard(self, root: Path, shard_set: Path, request: pytest.FixtureRequest) -> dict[str, list[str]]:
        if request.param == "set":
            run_dir = shard_set
        else:
            tree = write_folder(root / "tree", classes=("A.b", "__meta__", "\u00e9t\u00e9"), images_per_class=4)
            (tree / "A.b" / f"{'long' * 50}.PNG").write_bytes(png(1))
            source = {"kind": "image_folder", "root": str(tree), "samples_per_unit": 5}
            run_dir = tokenized(root, "folder", source)
        shards = {}
        for path in sorted(run_dir.glob("shards/*.tar")):
            with tarfile.open(path, "r:") as tar:
                shards[path.name] = tar.getnames()
        return shards

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
        wids = pytest.importorskip("wids")
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


class TestEnergon:
    """Energon opens what the job wrote; what `energon prepare` would write says the same."""

    @pytest.fixture(scope="class")
    def prepared(self, shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A copy of the shards alone, prepared by Energon's own command."""
        root = tmp_path_factory.mktemp("prepared")
        (root / "shards").mkdir()
        for tar in tars_of(shard_set):
            (root / "shards" / Path(tar).name).write_bytes(Path(tar).read_bytes())
        energon_prepare(root)
        return root

    def test_prepare_writes_the_indexes_that_stand_beside_our_shards(self, shard_set: Path, prepared: Path) -> None:
        theirs = {path.name: path.read_bytes() for path in prepared.glob("shards/*.tar.idx")}
        assert theirs == {path.name: path.read_bytes() for path in shard_set.glob("shards/*.tar.idx")}
        assert sorted(theirs) == ["00000.tar.idx", "00001.tar.idx", "00003.tar.idx"]

    @pytest.mark.parametrize("name", ["dataset.yaml", "split.yaml", ".info.json"])
    def test_prepare_says_what_our_sidecars_say(self, shard_set: Path, prepared: Path, name: str) -> None:
        ours, theirs = ((root / ".nv-meta" / name).read_text() for root in (shard_set, prepared))
        assert yaml.safe_load(ours) == yaml.safe_load(theirs)

    def test_prepare_takes_a_set_with_our_sidecars_and_leaves_its_shards(self, root: Path) -> None:
        urls = [f"{root}/tars/00000.tar", f"{root}/tars/00003.tar"]
        run_dir = tokenized(root, "prepared_too", {"kind": "webdataset", "urls": urls})
        before = {path: path.read_bytes() for path in run_dir.glob("shards/*")}
        energon_prepare(run_dir, "--force-overwrite")
        assert {path: path.read_bytes() for path in run_dir.glob("shards/*")} == before
        assert (run_dir / ".nv-meta" / "index.sqlite").is_file()

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_its_loader_reads_each_sample_once_without_prepare(self, shard_set: Path, num_workers: int) -> None:
        from megatron.energon import WorkerConfig, get_loader, get_val_dataset

        assert not (shard_set / ".nv-meta" / "index.sqlite").exists()
        dataset = get_val_dataset(
            shard_set,
            split_part="train",
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=num_workers),
            batch_size=4,
            task_encoder=crude_encoder(),
        )
        samples = [sample for batch in get_loader(dataset) for sample in batch]
        read = {sample.__key__: (sample.codes.tolist(), sample.metadata) for sample in samples}
        assert len(samples) == 18
        assert read == written(shard_set)

    def test_its_training_loader_shuffles_and_resumes(self, shard_set: Path) -> None:
        from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

        def loader() -> Any:
            dataset = get_train_dataset(
                shard_set,
                worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
                batch_size=3,
                shuffle_buffer_size=None,
                max_samples_per_sequence=None,
                task_encoder=crude_encoder(),
            )
            return get_savable_loader(dataset)

        first = loader()
        batches = iter(first)
        epoch = [sample.__key__ for _ in range(2) for sample in next(batches)]
        state = first.save_state_rank()
        rest = [sample.__key__ for _ in range(4) for sample in next(batches)]
        assert sorted(epoch + rest) == list(written(shard_set))
        second = loader()
        second.restore_state_rank(state)
        batches = iter(second)
        assert [sample.__key__ for _ in range(4) for sample in next(batches)] == rest


def energon_prepare(root: Path, *flags: str) -> None:
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(root), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1", "--no-progress"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def crude_encoder() -> Any:
    """A task encoder that passes codes and metadata on as they are."""
    from megatron.energon import Cooker, DefaultTaskEncoder, Sample, basic_sample_keys, edataclass, stateless

    @edataclass
    class CodesSample(Sample):
        codes: np.ndarray
        metadata: dict[str, Any]

    @stateless
    def cook(sample: dict[str, Any]) -> CodesSample:
        return CodesSample(**basic_sample_keys(sample), codes=sample["codes.npy"], metadata=sample["json"])

    class CodesEncoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, samples: list[CodesSample]) -> list[CodesSample]:
            return samples

    return CodesEncoder()


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
