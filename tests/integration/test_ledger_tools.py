"""What stands around a finished set: rejects tried again alone, codes encoded again, the state of a job told."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from toy_corpus import files_of, png, tokenize_config, write_folder, write_tiny_tokenizer

from jobs.cli import main
from pipeline import retry, tokenize
from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, TokenizeConfig
from pipeline.ledger import read_manifest, read_record
from pipeline.rejects import read_rejects
from pipeline.shards import read_shard
from pipeline.storage import open_storage
from pipeline.verify import verify_shard_set


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One Ray session for all jobs here; `run_tokenize` joins it."""
    with ray_session(ClusterConfig(num_workers=2)):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 18 images in units of 7, 4 of which are rejected, and in `set/` its finished shard set."""
    root = tmp_path_factory.mktemp("finished")
    write_tiny_tokenizer(root / "tiny.safetensors")
    tree = write_folder(root / "tree", images_per_class=6)
    (tree / "apple" / "2.png").write_bytes(b"no image")
    (tree / "bear" / "1.png").write_bytes(png(101)[:-40])
    (tree / "bear" / "5.png").write_bytes(png(105, width=300, height=300))
    (tree / "car" / "0.png").write_bytes(b"")
    run(root, "run")
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` of the test's own, specs that point to it included."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)  # copies modification times too
    for path in (tmp_path / "spec.yaml", tmp_path / "set" / "spec.json"):
        path.write_text(path.read_text().replace(str(finished), str(tmp_path)))
    return tmp_path


def spec_of(root: Path, **fields: Any) -> TokenizeConfig:
    source = {"kind": "image_folder", "root": str(root / "tree"), "samples_per_unit": 7}
    fields = {"max_rejected_fraction": 0.5, "max_image_pixels": 80_000, "cluster": {"num_workers": 1}} | fields
    return tokenize_config(root / "set", source=source, weights=root / "tiny.safetensors", **fields)


def run(root: Path, command: str, *words: str) -> Result:
    (root / "spec.yaml").write_text(spec_of(root).model_dump_json())
    result = CliRunner().invoke(main, [command, str(root / "spec.yaml"), *words])
    assert result.exit_code == 0, result.output
    return result


def data_of(root: Path) -> dict[str, bytes]:
    """The files of the set that a run writes for others to read: all but its ledger and plans."""
    read_by_others = ("shards/", "rejects/", "manifest")
    return {name: data for name, data in files_of(root / "set").items() if name.startswith(read_by_others)}


def totals_of(root: Path) -> tuple[int, int, int]:
    totals = read_manifest(open_storage(str(root / "set"))).totals
    return totals.num_read, totals.num_written, totals.num_rejected


def test_mended_samples_are_written_by_a_retry_and_the_ledger_balances(root: Path) -> None:
    storage = open_storage(str(root / "set"))
    before = files_of(root / "set")
    assert totals_of(root) == (18, 14, 4)
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    (root / "tree" / "bear" / "1.png").write_bytes(png(101))
    run(root, "retry-rejects")
    assert totals_of(root) == (18, 16, 2)
    assert read_manifest(storage).totals.rejected_by_reason == {"decode/empty": 1, "decode/too_many_pixels": 1}
    assert verify_shard_set(storage) == []
    old = {name for name in before if name.startswith("shards/") or name.startswith("rejects/")}
    assert {name: files_of(root / "set")[name] for name in old} == {name: before[name] for name in old}
    appended = [(sample.key, sample.metadata["source"]) for sample in read_shard(storage, "shards/00003.tar")]
    assert appended == [("000030", "apple/2.png"), ("000031", "bear/1.png")]
    assert read_record(storage, "00003").retried.keys == ["000002", "000010", "000014", "000015"]  # type: ignore[union-attr]
    assert [reject.source for reject in read_rejects(storage, "rejects/00003.parquet")] == ["bear/5.png", "car/0.png"]


@pytest.mark.parametrize(
    ("mended", "expected"),
    [
        ("apple/new_2.png", "unit 0 (files 0..6) must hold the samples that it was made from, got apple/new_2.png in"),
        (
            "car/9.png",
            "must hold the samples that it was made from, got bear/1.png in place of apple/2.png; put mended",
        ),
        ("apple/00.png", "got apple/00.png in place of apple/2.png; put mended files back under their old names"),
    ],
)
def test_a_retry_of_files_that_were_mended_under_other_names_is_refused_and_changes_nothing(
    root: Path, mended: str, expected: str
) -> None:
    """A unit of a folder is a run of its files: kept after another has come in, it would hide that one from the set."""
    (root / "tree" / "apple" / "2.png").unlink()
    (root / "tree" / mended).write_bytes(png(2))
    before, ledger = files_of(root / "set"), sorted((root / "set" / "ledger").iterdir())
    refused = CliRunner().invoke(main, ["retry-rejects", str(root / "spec.yaml")])
    assert refused.exit_code == 1
    assert expected in refused.output
    assert files_of(root / "set") == before
    assert sorted((root / "set" / "ledger").iterdir()) == ledger
    (root / "tree" / mended).rename(root / "tree" / "apple" / "2.png")
    run(root, "retry-rejects")
    assert totals_of(root) == (18, 15, 3)


def test_a_shard_lost_after_its_rejects_were_mended_and_retried_is_not_made_anew(root: Path) -> None:
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    run(root, "retry-rejects")
    kept = root / "kept.tar"
    (root / "set" / "shards" / "00000.tar").rename(kept)
    refused = CliRunner().invoke(main, ["run", str(root / "spec.yaml")])
    assert refused.exit_code == 1
    assert "00000.tar" in refused.output
    assert "whose input was mended for its rejects to be retried: done again, it would write sample" in refused.output
    kept.rename(root / "set" / "shards" / "00000.tar")
    run(root, "run")
    assert verify_shard_set(open_storage(str(root / "set"))) == []


@pytest.mark.parametrize("damage", ["cut", "missing"])
@pytest.mark.parametrize("has_killed_retry", [False, True])
def test_a_record_lost_after_its_rejects_were_mended_repeats_no_sample(
    root: Path, damage: str, has_killed_retry: bool
) -> None:
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    run(root, "retry-rejects")
    whole, record = data_of(root), root / "set" / "ledger" / "00000.json"
    kept = record.read_bytes()
    if has_killed_retry:
        (root / "set" / "ledger" / "00003.json").unlink()
    record.write_bytes(kept[:40]) if damage == "cut" else record.unlink()
    damaged = files_of(root / "set")
    refused = CliRunner().invoke(main, ["run", str(root / "spec.yaml")])
    assert refused.exit_code == 1
    damaged_or_missing = "damaged" if damage == "cut" else "missing"
    assert f"ledger/00000.json is {damaged_or_missing} in unit 0" in refused.output
    assert "it would write sample 000002 a second time; put the file back from a copy" in refused.output
    assert files_of(root / "set") == damaged
    record.write_bytes(kept)
    run(root, "run")
    assert data_of(root) == whole


def test_a_record_lost_after_a_retry_of_unchanged_input_is_made_anew(root: Path) -> None:
    run(root, "retry-rejects")
    whole = data_of(root)
    (root / "set" / "ledger" / "00000.json").unlink()
    (root / "set" / "ledger" / "00001.json").write_bytes(b"{")
    run(root, "run")
    assert totals_of(root) == (18, 14, 4)
    assert verify_shard_set(open_storage(str(root / "set"))) == []
    assert data_of(root) == whole


def test_a_shard_lost_after_a_retry_of_unchanged_input_is_made_anew(root: Path) -> None:
    run(root, "retry-rejects")
    before = files_of(root / "set")
    (root / "set" / "shards" / "00000.tar").unlink()
    (root / "set" / "shards" / "00001.tar").unlink()
    run(root, "run")
    assert {name: data for name, data in files_of(root / "set").items() if not name.startswith("ledger/")} == {
        name: data for name, data in before.items() if not name.startswith("ledger/")
    }


def test_a_rerun_after_a_retry_has_nothing_to_do(root: Path) -> None:
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    run(root, "retry-rejects")
    before, ledger = files_of(root / "set"), sorted((root / "set" / "ledger").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in ledger]
    run(root, "run")
    assert files_of(root / "set") == before
    assert [path.stat().st_mtime_ns for path in ledger] == times


def test_a_second_retry_takes_only_what_the_first_left(root: Path) -> None:
    run(root, "retry-rejects")
    assert totals_of(root) == (18, 14, 4)
    (root / "tree" / "car" / "0.png").write_bytes(png(200))
    run(root, "retry-rejects", "--set", "max_image_pixels=100000")
    assert totals_of(root) == (18, 16, 2)
    storage = open_storage(str(root / "set"))
    assert [sample.metadata["source"] for sample in read_shard(storage, "shards/00004.tar")] == [
        "bear/5.png",
        "car/0.png",
    ]
    assert not (root / "set" / "shards" / "00003.tar").exists()
    assert verify_shard_set(storage) == []


def test_a_unit_done_again_during_a_retry_with_a_higher_limit_keeps_its_own(root: Path) -> None:
    run(root, "retry-rejects", "--set", "max_image_pixels=100000")
    whole = data_of(root)
    assert totals_of(root) == (18, 15, 3)
    (root / "set" / "shards" / "00001.tar").unlink()
    run(root, "retry-rejects", "--set", "max_image_pixels=100000")
    assert totals_of(root) == (18, 15, 3)
    assert {name: data_of(root)[name] for name in whole if name.startswith("shards/")} == {
        name: data for name, data in whole.items() if name.startswith("shards/")
    }
    assert verify_shard_set(open_storage(str(root / "set"))) == []


def test_a_retry_that_was_planned_and_killed_is_done_by_the_next_run(root: Path) -> None:
    run(root, "retry-rejects")
    whole = files_of(root / "set")
    for name in ("ledger/00003.json", "rejects/00003.parquet", "manifest.json"):
        (root / "set" / name).unlink()
    run(root, "run")
    assert files_of(root / "set") == whole


@pytest.mark.parametrize(
    "not_written",
    [("ledger/00003.json", "shards/00003.tar", "rejects/00003.parquet", "manifest.json"), ("manifest.json",)],
)
def test_a_retry_that_was_killed_is_resumed_by_its_own_command(root: Path, not_written: tuple[str, ...]) -> None:
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    run(root, "retry-rejects")
    whole = files_of(root / "set")
    for name in not_written:
        (root / "set" / name).unlink()
    run(root, "retry-rejects")
    assert files_of(root / "set") == whole
    assert totals_of(root) == (18, 15, 3)


def test_a_corpus_of_which_nothing_was_readable_at_first_is_mended_by_retries(root: Path) -> None:
    tree = sorted((root / "tree").rglob("*.png"))
    pictures = [png(number) for number in range(len(tree))]
    for path in tree:
        path.write_bytes(b"no image")
    shutil.rmtree(root / "set")
    for command in ("run", "retry-rejects"):  # the first retry does not help either
        ended = CliRunner().invoke(main, [command, str(root / "spec.yaml"), "--set", "max_rejected_fraction=1"])
        assert ended.exit_code == 1
        assert "a set must hold samples, got none of 18 (rejected: decode/unknown_format 18" in ended.output
    for path, picture in zip(tree, pictures, strict=True):
        path.write_bytes(picture)
    run(root, "retry-rejects")
    assert totals_of(root) == (18, 18, 0)
    assert verify_shard_set(open_storage(str(root / "set"))) == []


def test_a_file_written_again_after_a_mended_retry_is_told(root: Path) -> None:
    """No record holds the contents of an input that was mended; names and sizes alone would let the change pass."""
    told = "unit 0 (files 0..6) is kept: its input was written again after its rejects were retried"
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    run(root, "retry-rejects")
    assert told not in run(root, "run").output
    whole = files_of(root / "set")
    good = root / "tree" / "apple" / "1.png"
    good.write_bytes(good.read_bytes()[::-1])
    assert told in run(root, "run").output
    assert told in run(root, "run").output
    assert files_of(root / "set") == whole
    record = root / "set" / "ledger" / "00003.json"
    marks = json.loads(record.read_text())["input_mark"]
    assert [len(mark) for mark in marks.split(" ")] == [16, 16]
    record.write_text(record.read_text().replace(marks, ""))  # as a version before wrote it
    assert told not in run(root, "run").output


def test_an_input_that_was_not_mended_for_its_retry_is_compared_when_its_times_change(root: Path) -> None:
    run(root, "retry-rejects", "--set", "max_image_pixels=100000")
    os.utime(root / "tree" / "apple" / "0.png", (1, 1))
    output = run(root, "run").output
    assert "units_moved_or_touched=1, their contents are the same" in output
    assert "is kept" not in output


def test_a_second_mend_is_told_to_be_retried(root: Path) -> None:
    (root / "tree" / "apple" / "2.png").write_bytes(png(2))
    run(root, "retry-rejects")
    (root / "tree" / "bear" / "1.png").write_bytes(png(101))
    refused = CliRunner().invoke(main, ["run", str(root / "spec.yaml")])
    assert refused.exit_code == 1
    assert "in unit 1 (files 7..13) after its rejects were retried; run tensorar retry-rejects if" in refused.output
    run(root, "retry-rejects")
    assert totals_of(root) == (18, 16, 2)
    assert "is kept" not in run(root, "run").output


def test_a_retry_of_a_set_with_a_unit_to_do_is_refused(root: Path) -> None:
    for name in ("ledger/00001.json", "manifest.json"):
        (root / "set" / name).unlink()
    result = CliRunner().invoke(main, ["retry-rejects", str(root / "spec.yaml")])
    assert result.exit_code == 1
    assert "every unit must have a ledger record, got none of 1 of 3 units; run its job first" in result.output


def test_a_set_that_rejects_have_ended_is_mended_by_a_retry(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is over the limit judges each unit; a retry could never begin if its first unit were judged."""
    ended = CliRunner().invoke(main, ["run", str(root / "spec.yaml"), "--set", "max_rejected_fraction=0.1"])
    assert ended.exit_code == 1
    assert "at most 10.0% of the samples may be rejected, got 4 of 18" in ended.output
    (root / "set" / "manifest.json").unlink()
    for number, name in enumerate(("apple/2.png", "bear/1.png", "bear/5.png", "car/0.png")):
        (root / "tree" / name).write_bytes(png(number))
    monkeypatch.setattr(tokenize, "MIN_SAMPLES_TO_JUDGE", 1)
    monkeypatch.setattr(retry, "MAX_SAMPLES_PER_UNIT", 1)
    run(root, "retry-rejects", "--set", "max_rejected_fraction=0.1")
    assert totals_of(root) == (18, 18, 0)
    assert read_manifest(open_storage(str(root / "set"))).shards[-1].name == "00006.tar"


def test_codes_are_the_same_when_encoded_again(root: Path) -> None:
    result = CliRunner().invoke(main, ["verify", "--deep", str(root / "set")])
    assert result.exit_code == 0, result.output
    assert "a shard set; 0 of 224 codes of 14 samples differ when encoded again; everything is whole" in result.output


def test_codes_of_another_image_are_noticed_by_a_deep_verify(root: Path) -> None:
    """The corpus changed under the set, so its codes do not come out again."""
    target = root / "tree" / "apple" / "0.png"
    times = (target.stat().st_atime, target.stat().st_mtime)
    target.write_bytes(png(999))
    os.utime(target, times)
    result = CliRunner().invoke(main, ["verify", "--deep", str(root / "set")])
    assert result.exit_code == 1
    assert "up to 0.00% may differ" in result.output


def test_status_tells_what_is_done_and_what_was_rejected(root: Path) -> None:
    (root / "set" / "ledger" / "00001.json").unlink()
    (root / "set" / "manifest.json").unlink()
    result = CliRunner().invoke(main, ["status", str(root / "set")])
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in result.output.splitlines()]
    for cell in (["units done", "2 of 3"], ["samples read", "11"], ["rejected: decode/unknown_format", "1"]):
        assert cell in cells
    assert "ended" in result.output
    assert "run the spec again" in result.output


def test_status_of_a_directory_without_a_job_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert result.exit_code == 1
    assert "it must be the run_dir of a job or a study, got no spec.json" in result.output
