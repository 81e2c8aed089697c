"""`tensorar export`: what it tells at the end, and what it refuses."""

from pathlib import Path

from click.testing import CliRunner
from synthetic_shards import write_shard_set

from jobs.cli import main
from pipeline.ledger import read_manifest, write_manifest
from pipeline.storage import open_storage
from tokenization.config import ViewsConfig


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
        f"next:  LlamaGen's train_c2i.py --code-path {code_path} --image-size 8 --vocab-size 16",
        "       after 1281167 in its dataset/imagenet.py was set to 5, the number of files",
        "       keep `flip` in the path: without it, the views are read as one long sequence",
        "       a set with crop_range 1.05 exported to the same --output is drawn from half of the time",
    ]


def test_the_command_refuses_a_directory_that_is_no_finished_set(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(tmp_path), "--to", "llamagen", "--output", str(tmp_path / "out")])
    assert (result.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert result.stderr.startswith(f"error: export {tmp_path}: the directory must be the run_dir of a finished")
