"""Verify finds every kind of damage; a rerun does again what is not as its record says; other jobs are refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from toy_corpus import sample_members, tokenize_config, tokenize_here, write_tar, write_tars, write_tiny_tokenizer

from jobs.cli import main
from pipeline.config import S3Config, TokenizeConfig
from pipeline.gathered import Ledger
from pipeline.ledger import LedgerRecord, Manifest, read_manifest, read_record
from pipeline.rejects import Counts, Reject, count
from pipeline.resume import check_identity, find_finished, with_begun_keys
from pipeline.retry import RetrySource
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError, open_storage
from pipeline.verify import verify_shard_set
from tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus (`tars/`), a tokenizer and the finished set (`set/`) of 3 units, one bad sample."""
    root = tmp_path_factory.mktemp("finished")
    write_tiny_tokenizer(root / "tiny.safetensors")
    write_tars(root / "tars", num_tars=2, samples_per_tar=5)
    write_tar(root / "tars" / "00002.tar", [*sample_members(10), ("bad.png", b"no image"), *sample_members(11)])
    tokenize_here(config_of(root))
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)  # copies modification times too
    return tmp_path


def config_of(root: Path, **fields: Any) -> TokenizeConfig:
    source = {"kind": "webdataset", "urls": [f"{root}/tars/{{00000..00002}}.tar"]}
    return tokenize_config(root / "set", source=source, weights=root / "tiny.safetensors", **fields)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def rename_keys(shards: Path) -> None:
    shutil.copy(shards / "00000.tar", shards / "00001.tar")


def test_a_finished_set_is_whole(root: Path) -> None:
    assert verify_shard_set(open_storage(str(root / "set"))) == []
    assert read_manifest(open_storage(str(root / "set"))).totals.num_rejected == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda s: (s / "shards/00001.tar").unlink(), "00001.tar is missing"),
        (lambda s: (s / "shards/00001.tar.idx").unlink(), "00001.tar.idx is missing"),
        (lambda s: os.truncate(s / "shards/00001.tar", 5000), "must have"),
        (lambda s: flip_a_byte(s / "shards/00001.tar"), "sha256 differs from its ledger record (want "),
        (lambda s: os.truncate(s / "shards/00001.tar.idx", 8), "must have 6 offsets"),
        (lambda s: rename_keys(s / "shards"), "keys must begin 00001"),
        (lambda s: shutil.copy(s / "shards/00001.tar", s / "shards/00003.tar"), "no ledger record speaks of it"),
        (lambda s: (s / "ledger/00001.json").unlink(), "unit 1 must come next, got 2"),
        (lambda s: (s / "ledger/00002.json").unlink(), "must list the ledger's 2 shards, got 3"),
        (lambda s: (s / "ledger/00001.json").write_text("{"), "ledger/00001.json"),
        (lambda s: (s / "rejects/00002.parquet").unlink(), "its rejects are missing"),
        (lambda s: (s / "rejects/00002.parquet").write_text("x"), "must be a rejects table"),
        (lambda s: shutil.copy(s / "rejects/00002.parquet", s / "rejects/00000.parquet"), "no ledger record speaks"),
        (
            lambda s: (s / "shards/.staged-00007.tar-1-a").write_text("x"),
            "staged leftover shards/.staged-00007.tar-1",
        ),
        (lambda s: (s / "shardindex.json").unlink(), "shardindex.json: must be there for other readers, got nothing"),
        (lambda s: (s / ".nv-meta/split.yaml").unlink(), "split.yaml: must be there for other readers, got nothing"),
        (
            lambda s: edit_json(s / "shardindex.json", lambda i: i["shardlist"].pop()),
            "shardindex.json: must list the manifest's 3 shards",
        ),
        (
            lambda s: edit_json(s / ".nv-meta/.info.json", lambda i: i["shard_counts"].update({"shards/00000.tar": 4})),
            ".info.json: must list the manifest's 3 shards",
        ),
        (lambda s: (s / ".nv-meta/.info.json").write_text("[]"), ".info.json: must list the manifest's 3 shards"),
        (lambda s: (s / "manifest.json").unlink(), "finish the tokenize job"),
        (lambda s: edit_json(s / "manifest.json", lambda m: m.update(version=2)), "version"),
        (lambda s: edit_json(s / "manifest.json", lambda m: m.update(num_samples=11)), "got 11 of 13"),
        (
            lambda s: edit_json(s / "manifest.json", lambda m: m["shards"].pop()),
            "must list the ledger's 3 shards, got 2",
        ),
        (lambda s: edit_json(s / "manifest.json", lambda m: m.update(codes_per_image=9)), "must be uint16 (1, 9)"),
        (
            lambda s: edit_json(s / "manifest.json", lambda m: m["fingerprint"].update(batch_size=9)),
            "must be the manifest's",
        ),
        (
            lambda s: edit_json(s / "ledger/00000.json", lambda r: r["counts"].update(num_read=6)),
            "read must be written",
        ),
        (
            lambda s: edit_json(s / "ledger/00000.json", lambda r: r["shard"].update(num_samples=4)),
            "must have 5 offsets",
        ),
    ],
)
def test_verify_finds(root: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(root / "set")
    problems = verify_shard_set(open_storage(str(root / "set")))
    assert any(expected in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize("name", ["manifest.json", "ledger/00000.json", "ledger/00001.json"])
def test_a_newer_version_is_all_that_verify_tells(root: Path, name: str) -> None:
    edit_json(root / "set" / name, lambda value: value.update(version=2))
    flip_a_byte(root / "set" / "shards" / "00002.tar")
    done = CliRunner().invoke(main, ["verify", str(root / "set")])
    said = f"read {root}/set/{name}: version must be 1, got 2; update tensorar, a newer one wrote it"
    assert (done.exit_code, done.stderr.splitlines()) == (1, [said, f"{root}/set: a shard set; 1 problems"])


def test_status_of_a_set_of_a_newer_version_asks_for_an_update(root: Path) -> None:
    edit_json(root / "set" / "ledger" / "00000.json", lambda record: record.update(version=2))
    done = CliRunner().invoke(main, ["status", str(root / "set")])
    said = f"read {root}/set/ledger/00000.json: version must be 1, got 2; update tensorar, a newer one wrote it"
    assert (done.exit_code, done.output) == (1, f"error: {said}\n")


@pytest.mark.parametrize("stem", ["00000", "00001"])
def test_a_damaged_record_makes_no_strays_and_no_gap_of_its_unit(root: Path, stem: str) -> None:
    (root / "set" / "ledger" / f"{stem}.json").write_text("{")
    problems = verify_shard_set(open_storage(str(root / "set")))
    assert problems[0].startswith(f"read {root}/set/ledger/{stem}.json: ")
    assert not [line for line in problems if "no ledger record speaks of it" in line or "must come next" in line]


@pytest.mark.parametrize("name", ["manifest.json", "ledger/00000.json"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version must be 1, got 2; update tensorar, a newer one wrote it"),
        ({"version": 3, "counts": []}, "version must be 1, got 3; update tensorar, a newer one wrote it"),
        ({"hue": 1}, "hue: extra inputs are not permitted; update tensorar, a newer one wrote it"),
        ({"version": "1"}, "version: input should be 1; remove it and rerun the tokenize job"),
        ({"fingerprint": 1, "counts": 1}, "; remove it and rerun the tokenize job"),
    ],
)
def test_a_file_of_a_newer_version_is_not_to_be_removed(
    root: Path, name: str, change: dict[str, Any], said: str
) -> None:
    edit_json(root / "set" / name, lambda value: value.update(change))
    storage = open_storage(str(root / "set"))
    with pytest.raises(ArtifactError) as caught:
        read_manifest(storage) if name == "manifest.json" else read_record(storage, "00000")
    assert str(caught.value).startswith(f"read {root}/set/{name}: ")
    assert str(caught.value).endswith(said)


def finished_units(root: Path) -> list[int]:
    """Units that need no work; all files of the others, and no more, are to be removed."""
    config = config_of(root)
    source = make_source(config.source, s3=config.s3)
    digest = Tokenizer.load(config_of(root).tokenizer).fingerprint.digest
    storage, plan = open_storage(str(root / "set")), source.plan()
    found = find_finished(
        storage,
        config=config,
        source=RetrySource(source),
        plan=plan,
        fingerprint_digest=digest,
        ledger=Ledger(storage),
    )
    finished = [unit.unit_index for unit in plan.units if unit.unit_index in found.tally]
    files = [path for name in ("shards", "rejects") for path in (root / "set" / name).iterdir()]
    left_over = [path for path in files if int(path.name[:5]) not in finished]
    assert sorted(found.uncommitted) == sorted(str(path.relative_to(root / "set")) for path in left_over)
    return finished


def test_a_record_of_a_newer_version_ends_a_rerun_and_is_left_as_it_is(root: Path) -> None:
    path = root / "set" / "ledger" / "00001.json"
    edit_json(path, lambda value: value.update(version=2))
    before = path.read_bytes()
    with pytest.raises(
        ArtifactError, match=r"00001\.json: version must be 1, got 2; update tensorar, a newer one wrote"
    ):
        finished_units(root)
    assert path.read_bytes() == before


def rewrite_same_size(path: Path) -> None:
    data = path.read_bytes()
    assert b"thing 7" in data
    path.write_bytes(data.replace(b"thing 7", b"thing 8"))


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda r: None, [0, 1, 2]),
        (lambda r: os.utime(r / "tars/00001.tar", (1, 1)), [0, 1, 2]),
        (lambda r: os.utime(r / "set/shards/00001.tar", (1, 1)), [0, 1, 2]),
        (lambda r: rewrite_same_size(r / "tars/00001.tar"), [0, 2]),
        (lambda r: write_tars(r / "tars", num_tars=1, samples_per_tar=20), [1, 2]),
        (lambda r: (r / "set/shards/00001.tar").unlink(), [0, 2]),
        (lambda r: (r / "set/shards/00001.tar.idx").unlink(), [0, 2]),
        (lambda r: flip_a_byte(r / "set/shards/00001.tar"), [0, 2]),
        (lambda r: (r / "set/rejects/00002.parquet").unlink(), [0, 1]),
        (lambda r: (r / "set/ledger/00000.json").unlink(), [1, 2]),
        (lambda r: (r / "set/ledger/00000.json").write_text("torn"), [1, 2]),
    ],
)
def test_a_rerun_skips_only_what_is_as_its_record_says(
    root: Path, change: Callable[[Path], object], left: list[int]
) -> None:
    change(root)
    assert finished_units(root) == left
    # No record vouches for what is about to be replaced.
    assert sorted(path.stem for path in (root / "set" / "ledger").glob("*.json")) == [f"{unit:05d}" for unit in left]


def test_the_contents_of_what_was_moved_are_read_once(root: Path) -> None:
    tar, shard = root / "tars/00001.tar", root / "set/shards/00000.tar"
    for path in (tar, shard):
        os.utime(path, (1, 1))
    before = read_record(open_storage(str(root / "set")), "00000")
    assert finished_units(root) == [0, 1, 2]
    renewed = read_record(open_storage(str(root / "set")), "00000")
    assert renewed == before.model_copy(update={"shard_mark": "1000000000"})
    record = root / "set" / "ledger" / "00000.json"  # is not read either, its copy is gathered
    status = record.stat()
    record.write_bytes(b"x" * status.st_size)
    os.utime(record, ns=(status.st_atime_ns, status.st_mtime_ns))
    for path in (tar, shard):  # same size, same time, other content: whoever reads it sees that
        path.write_bytes(b"x" * path.stat().st_size)
        os.utime(path, (1, 1))
    assert finished_units(root) == [0, 1, 2]


def test_a_rerun_with_nothing_to_do_writes_nothing(root: Path) -> None:
    def states() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (root / "set").rglob("*")}

    before = states()
    assert finished_units(root) == [0, 1, 2]
    assert states() == before


@pytest.mark.parametrize("name", ["00003.json", "0000.json", "x.json"])
def test_a_damaged_record_of_no_unit_of_the_plan_is_refused(root: Path, name: str) -> None:
    (root / "set" / "ledger" / name).write_text("torn")
    with pytest.raises(ArtifactError, match=rf"ledger/{name} is of no unit of the plan; use another run_dir"):
        finished_units(root)
    assert (root / "set" / "ledger" / name).exists()


def test_a_record_under_the_digits_of_another_unit_is_refused(root: Path) -> None:
    shutil.copy(root / "set" / "ledger" / "00000.json", root / "set" / "ledger" / "00001.json")
    with pytest.raises(ArtifactError, match=r"unit 0 of 00001\.json is not in the plan; use another run_dir"):
        finished_units(root)


def test_a_unit_of_another_file_is_refused(root: Path) -> None:
    (root / "tars" / "00001.tar").rename(root / "tars" / "other.tar")
    corpus = {"kind": "webdataset", "urls": [f"{root}/tars/{name}.tar" for name in ("00000", "other", "00002")]}
    config = tokenize_config(root / "set", source=corpus, weights=root / "tiny.safetensors")
    digest = Tokenizer.load(config.tokenizer).fingerprint.digest
    source = make_source(config.source, s3=config.s3)
    storage = open_storage(str(root / "set"))
    plan, ledger = source.plan(), Ledger(storage)
    with pytest.raises(ArtifactError, match=r"unit 1 was made from '00001\.tar', got 'other\.tar'"):
        find_finished(
            storage,
            config=config,
            source=RetrySource(source),
            plan=plan,
            fingerprint_digest=digest,
            ledger=ledger,
        )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"views": {"kind": "flip"}}, "views.kind 'center' -> 'flip'"),
        ({"rules": {"min_side_px": 8}}, "rules.min_side_px 0 -> 8"),
        ({"max_image_pixels": 5}, "max_image_pixels 100000000 -> 5"),
    ],
)
def test_another_job_in_the_same_directory_is_refused_naming_the_fields(
    root: Path, fields: dict[str, Any], expected: str
) -> None:
    config = config_of(root, **fields)
    fingerprint = Tokenizer.load(config.tokenizer).fingerprint
    the_plan = make_source(config.source, s3=config.s3).plan()
    with pytest.raises(ArtifactError) as caught:
        check_identity(open_storage(str(root / "set")), config=config, plan=the_plan, fingerprint=fingerprint)
    assert expected in str(caught.value)


def test_another_tokenizer_in_the_same_directory_is_refused_naming_the_fields(root: Path) -> None:
    write_tiny_tokenizer(root / "tiny.safetensors", seed=1)
    config = config_of(root)
    fingerprint = Tokenizer.load(config.tokenizer).fingerprint
    the_plan = make_source(config.source, s3=config.s3).plan()
    with pytest.raises(ArtifactError, match=r"got fingerprint\.weights_sha256 '\w+' -> '\w+'; use another run_dir"):
        check_identity(open_storage(str(root / "set")), config=config, plan=the_plan, fingerprint=fingerprint)


def test_a_ledger_whose_plan_is_lost_or_damaged_is_nobodys(root: Path) -> None:
    config, storage = config_of(root), open_storage(str(root / "set"))
    fingerprint = Tokenizer.load(config.tokenizer).fingerprint
    the_plan = with_begun_keys(storage, make_source(config.source, s3=config.s3).plan())
    begun_with = check_identity(storage, config=config, plan=the_plan, fingerprint=fingerprint)
    (root / "set" / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"plan\.json must be JSON, got .*; use another run_dir"):
        check_identity(storage, config=config, plan=the_plan, fingerprint=fingerprint)
    (root / "set" / "plan.json").unlink()
    with pytest.raises(ArtifactError, match=r"plan\.json is missing beside a ledger; use another run_dir"):
        check_identity(storage, config=config, plan=the_plan, fingerprint=fingerprint)
    assert not (root / "set" / "plan.json").exists()
    shutil.rmtree(root / "set" / "ledger")
    assert check_identity(storage, config=config, plan=the_plan, fingerprint=fingerprint) == begun_with
    assert json.loads((root / "set" / "plan.json").read_text()) == begun_with


def test_a_set_keeps_the_key_widths_that_it_was_begun_with(root: Path) -> None:
    storage = open_storage(str(root / "set"))
    with (root / "tars" / "00001.tar").open("ab") as file:
        file.truncate(5_000 * 512)  # at most 5000 samples, where the set was begun with room for 100
    grown = make_source(config_of(root).source, s3=S3Config()).plan()
    assert (grown.keys.key(1, 7), with_begun_keys(storage, grown).keys.key(1, 7)) == ("000010007", "0000107")
    edit_json(root / "set" / "plan.json", lambda plan: plan.update(position_digits=3))  # as a version before chose
    assert with_begun_keys(storage, grown).keys.key(1, 7) == "00001007"
    for damaged in ("{", "[]", '{"unit_digits": null}', '{"unit_digits": 5}', '{"unit_digits": "x"}'):
        (root / "set" / "plan.json").write_text(damaged)
        assert with_begun_keys(storage, grown) == grown
    (root / "set" / "plan.json").unlink()
    assert with_begun_keys(storage, grown) == grown


def test_counts_that_do_not_balance_cannot_be_made() -> None:
    good = {"num_read": 3, "num_written": 1, "num_dropped": 1, "num_rejected": 1}
    reasons = {"dropped_by_reason": {"min_side_px": 1}, "rejected_by_reason": {"decode/empty": 1}}
    assert Counts(**good, **reasons).num_read == 3
    with pytest.raises(ValidationError, match="written \\+ dropped \\+ rejected = 3, got 4"):
        Counts(**(good | {"num_read": 4}), **reasons)
    with pytest.raises(ValidationError, match="add up to num_rejected"):
        Counts(**good, **(reasons | {"rejected_by_reason": {}}))


def test_counts_come_from_the_rejects() -> None:
    stages = [("rule", "min_side_px"), ("decode", "empty"), ("rule", "min_side_px")]
    rejects = [Reject(key="0", source="a", stage=stage, reason=reason, detail="") for stage, reason in stages]
    assert count(rejects, num_written=4) == Counts(
        num_read=7,
        num_written=4,
        num_dropped=2,
        num_rejected=1,
        dropped_by_reason={"min_side_px": 2},
        rejected_by_reason={"decode/empty": 1},
    )


def test_every_field_on_disk_is_described() -> None:
    for model in (LedgerRecord, Manifest, Counts):
        assert all(field.description for name, field in model.model_fields.items())


def test_verify_finds_a_shard_that_is_cut_at_any_block_or_whose_bytes_are_another_shards(root: Path) -> None:
    shards, storage = root / "set" / "shards", open_storage(str(root / "set"))
    whole = (shards / "00001.tar").read_bytes()
    for cut in range(0, len(whole), 512):
        (shards / "00001.tar").write_bytes(whole[:cut])
        assert any("shards/00001.tar" in problem for problem in verify_shard_set(storage)), cut
    (shards / "00001.tar").write_bytes((shards / "00000.tar").read_bytes())
    (shards / "00000.tar").write_bytes(whole)
    problems = "\n".join(verify_shard_set(storage))
    assert "shards/00000.tar: sha256 differs" in problems
    assert "shards/00001.tar: sha256 differs" in problems
