"""`tensorar export`: what it tells at the end, and what it refuses."""

import argparse
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic_shards import fingerprint_of, write_shard_set

from jobs.cli import main
from pipeline.ledger import read_manifest, write_manifest
from pipeline.storage import open_storage
from tokenization.config import VQ8, VQ16, ViewsConfig, VQConfig


def test_the_command_tells_where_the_codes_are_and_how_llamagen_takes_them(tmp_path: Path) -> None:
    run_dir = write_shard_set(tmp_path / "set", samples_per_shard=(3, 2), num_views=10)
    storage = open_storage(str(run_dir))
    manifest = read_manifest(storage)
    write_manifest(storage, manifest.model_copy(update={"views": ViewsConfig(kind="ten_crop")}))
    result = CliRunner().invoke(main, ["export", str(run_dir), "--to", "llamagen", "--output", str(tmp_path / "out")])
    code_path = tmp_path / "out" / "code_c2i_flip_ten_crop"
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"codes: {code_path} (5 samples, 10 views of 16 codes)",
        f"next:  LlamaGen's train_c2i.py --code-path {code_path} --cloud-save-path DIR --image-size 8 "
        "--downsample-size 2 --vocab-size 16",
        "       after 1281167 in its dataset/imagenet.py was set to 5, the number of files",
        "       after 8 was added to the choices of --image-size in train_c2i.py, 256, 384, 448, 512",
        "       after 2 was added to the choices of --downsample-size in train_c2i.py, 8, 16",
        "       with DIR for a second copy of its checkpoints",
        "       with --num-classes above the largest label, where that is not below 1000",
        "       keep `flip` in the path: without it, the views are read as one long sequence",
        "       a set with crop_range 1.05 exported to the same --output is drawn from half of the time",
    ]


def llamagen_arguments(words: list[str]) -> argparse.Namespace:
    """What LlamaGen's train_c2i.py makes of a command line: those of its arguments that speak of the data."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--code-path", type=str, required=True)
    parser.add_argument("--cloud-save-path", type=str, required=True)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--image-size", type=int, choices=[256, 384, 448, 512], default=256)
    parser.add_argument("--downsample-size", type=int, choices=[8, 16], default=16)
    parser.add_argument("--num-classes", type=int, default=1000)
    return parser.parse_args(words)


@pytest.mark.parametrize(("network", "num_codes"), [(VQ16, 256), (VQ8, 1024)])
def test_llamagen_takes_the_command_that_is_told(tmp_path: Path, network: VQConfig, num_codes: int) -> None:
    fingerprint = fingerprint_of().model_copy(update={"network": network, "image_size_px": 256})
    run_dir = write_shard_set(tmp_path / "a set", samples_per_shard=(2, 1), fingerprint=fingerprint)
    storage = open_storage(str(run_dir))
    manifest = read_manifest(storage)
    write_manifest(storage, manifest.model_copy(update={"class_names": ["ant", "bee", "cat"]}))
    words = ["export", str(run_dir), "--to", "llamagen", "--output", str(tmp_path / "my codes")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    command, *conditions = result.stdout.splitlines()[1:]
    taken = llamagen_arguments(shlex.split(command.replace("LlamaGen's", "LlamaGen"))[3:])
    assert (taken.code_path, taken.num_classes) == (str(tmp_path / "my codes" / "code_c2i"), 3)
    assert (taken.image_size // taken.downsample_size) ** 2 == num_codes
    assert taken.vocab_size == 16384
    assert not [line for line in conditions if "choices" in line or "num-classes" in line]


def test_the_command_refuses_a_directory_that_is_no_finished_set(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(tmp_path), "--to", "llamagen", "--output", str(tmp_path / "out")])
    assert (result.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert result.stderr.startswith(f"error: export {tmp_path}: the directory must be the run_dir of a finished")


def test_a_folder_of_checkpoints_is_told_what_to_name_instead(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    words = ["export", str(tmp_path / "checkpoints"), "--to", "safetensors", "--output", "m.safetensors"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "or name its run_dir or one checkpoints/step_ below that" in result.stderr
