"""One work unit: codes as by hand, every sample accounted for, the record last."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch._inductor.config
from disk_calls import record_disk_calls
from toy_corpus import png, sample_members, tokenize_config, write_tar, write_tiny_tokenizer

from pipeline.config import RulesConfig, TokenizeConfig
from pipeline.ledger import LedgerRecord, read_record
from pipeline.prepare import broken_rule
from pipeline.rejects import read_rejects
from pipeline.shards import ShardWriter, WrittenShard, read_shard
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError, open_storage
from pipeline.worker import UnitTokenizer
from tokenization.crops import make_views
from tokenization.decoding import decode_image
from tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def config_of(tmp_path: Path, weights: Path, **fields: Any) -> TokenizeConfig:
    source = {"kind": "webdataset", "urls": [str(tmp_path / "00000.tar")]}
    return tokenize_config(tmp_path / "set", source=source, weights=weights, **fields)


def run(config: TokenizeConfig) -> LedgerRecord:
    the_plan = make_source(config.source, s3=config.s3).plan()
    digest = Tokenizer.load(config.tokenizer).fingerprint.digest
    return UnitTokenizer(config, keys=the_plan.keys, fingerprint_digest=digest).run(the_plan.units[0]).record


@pytest.mark.parametrize(("views", "num_views"), [("center", 1), ("flip", 2), ("ten_crop", 10)])
def test_codes_are_those_of_full_batches_over_all_views_in_order(
    tmp_path: Path, weights: Path, views: str, num_views: int
) -> None:
    write_tar(tmp_path / "00000.tar", [member for number in range(7) for member in sample_members(number)])
    config = config_of(tmp_path, weights, views={"kind": views})
    record = run(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    images = [
        image
        for number in range(7)
        for image in make_views(
            decode_image(png(number), max_pixels=10_000), config=config.views, image_size_px=16
        ).images_VHWC
    ]
    by_hand = np.concatenate([tokenizer.encode(np.stack(images[i : i + 4])) for i in range(0, len(images), 4)])
    shard = list(read_shard(open_storage(str(tmp_path / "set")), "shards/00000.tar"))
    np.testing.assert_array_equal(
        np.stack([sample.codes_VT for sample in shard]), by_hand.reshape(7, num_views, tokenizer.codes_per_image)
    )
    assert len(np.unique(by_hand)) > 10
    assert record.counts.num_written == record.counts.num_read == 7


@pytest.mark.parametrize(("in_a_row", "expected"), [(1, [4, 4, 4, 4, 4, 4, 4, 2]), (9, [8, 8, 8, 6]), (128, [30])])
def test_batches_are_full_but_for_the_last_also_where_views_straddle_them(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, in_a_row: int, expected: list[int]
) -> None:
    write_tar(tmp_path / "00000.tar", [member for number in range(3) for member in sample_members(number)])
    sizes: list[int] = []
    encode = Tokenizer.encode

    def watched(self: Tokenizer, images_NHWC: np.ndarray) -> np.ndarray:
        sizes.append(len(images_NHWC))
        return encode(self, images_NHWC)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    monkeypatch.setattr("pipeline.worker.IMAGES_IN_A_ROW", in_a_row)
    run(config_of(tmp_path, weights, views={"kind": "ten_crop"}))
    assert sizes == [1, *expected]  # first a blank image; encode takes them in batches of 4


def test_metadata_tells_where_a_sample_comes_from(tmp_path: Path, weights: Path) -> None:
    write_tar(tmp_path / "00000.tar", sample_members(4, style="flat"))
    run(config_of(tmp_path, weights))
    (sample,) = read_shard(open_storage(str(tmp_path / "set")), "shards/00000.tar")
    views = sample.metadata.pop("views")
    assert [view["flipped"] for view in views] == [False]
    assert len(views[0]["box_px"]) == 4
    assert sample.metadata == {
        "caption": "thing 4",
        "label": 1,
        "width": 40,
        "height": 36,
        "source": "s0004",
        "extra": {"group": "toys", "style": "flat"},
    }


def test_each_sample_is_written_dropped_or_rejected_and_named(tmp_path: Path, weights: Path) -> None:
    members = [
        *sample_members(0),
        ("torn.png", png(1)[:-40]),
        ("text.png", b"not an image"),
        ("label.png", png(2)),
        ("label.cls", b"x"),
        ("small.png", png(3, width=20, height=4)),
        ("huge.png", png(4, width=90, height=90)),
        ("long.png", png(5, width=800, height=5)),
        ("thread.png", png(6, width=505, height=5)),
        *sample_members(9),
    ]
    write_tar(tmp_path / "00000.tar", members)
    rules = {"min_side_px": 5, "max_aspect_ratio": 150.0}
    record = run(config_of(tmp_path, weights, rules=rules, max_image_pixels=5000))
    rejects = read_rejects(open_storage(str(tmp_path / "set")), "rejects/00000.parquet")
    assert [(reject.key, reject.source, reject.stage, reject.reason) for reject in rejects] == [
        ("0000001", "torn", "decode", "truncated"),
        ("0000002", "text", "decode", "unknown_format"),
        ("0000003", "label", "read", "bad_label"),
        ("0000004", "small", "rule", "min_side_px"),
        ("0000005", "huge", "decode", "too_many_pixels"),
        ("0000006", "long", "rule", "max_aspect_ratio"),
        ("0000007", "thread", "crop", "too_elongated"),
    ]
    shard = read_shard(open_storage(str(tmp_path / "set")), "shards/00000.tar")
    assert [sample.key for sample in shard] == ["0000000", "0000008"]
    assert record.counts.model_dump() == {
        "num_read": 9,
        "num_written": 2,
        "num_dropped": 2,
        "num_rejected": 5,
        "dropped_by_reason": {"max_aspect_ratio": 1, "min_side_px": 1},
        "rejected_by_reason": {
            "crop/too_elongated": 1,
            "decode/too_many_pixels": 1,
            "decode/truncated": 1,
            "decode/unknown_format": 1,
            "read/bad_label": 1,
        },
    }
    assert read_record(open_storage(str(tmp_path / "set")), "00000") == record


def test_a_unit_without_a_good_sample_has_a_record_and_no_shard(tmp_path: Path, weights: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("a.png", b"")])
    record = run(config_of(tmp_path, weights))
    assert record.shard is None
    assert record.counts.num_rejected == record.counts.num_read == 1
    assert sorted(path.name for path in (tmp_path / "set").rglob("*") if path.is_file()) == [
        "00000.json",
        "00000.parquet",
    ]


@pytest.mark.parametrize(("cpus", "num_lost"), [(1, 1), (1, 3), (2, 1)])
def test_a_unit_that_lost_a_sample_has_no_record(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, cpus: int, num_lost: int
) -> None:
    write_tar(tmp_path / "00000.tar", [*sample_members(0), ("torn.png", png(1)[:-40]), *sample_members(2)])
    config = config_of(tmp_path, weights, cluster={"cpus_per_worker": cpus})
    prepare = UnitTokenizer._prepare

    def lossy(self: UnitTokenizer, *arguments: Any) -> list[Any]:
        return prepare(self, *arguments)[num_lost:]

    monkeypatch.setattr(UnitTokenizer, "_prepare", lossy)
    with pytest.raises(
        RuntimeError,
        match=rf"tokenize unit 00000 \(.*00000\.tar\): every sample that was read must be written, dropped or "
        rf"rejected, got {3 - num_lost} of 3; this is a defect of tensorar, report it",
    ):
        run(config)
    assert not list((tmp_path / "set").glob("ledger/*"))


def test_files_are_on_disk_before_what_speaks_of_them(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "00000.tar", [*sample_members(0), ("torn.png", png(1)[:-40])])
    calls = record_disk_calls(monkeypatch, root=tmp_path)
    record = run(config_of(tmp_path, weights))
    assert [call for call in calls if call.startswith("rename")] == [
        f"rename to set/{name}"
        for name in ("shards/00000.tar.idx", "shards/00000.tar", "rejects/00000.parquet", "ledger/00000.json")
    ]
    assert record.shard is not None
    shard = (tmp_path / "set" / "shards" / "00000.tar").read_bytes()
    assert (record.shard.bytes, record.shard.sha256) == (len(shard), hashlib.sha256(shard).hexdigest())


def test_a_shard_that_does_not_read_back_is_not_committed(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "00000.tar", sample_members(0))
    close = ShardWriter.close

    def lossy(self: ShardWriter) -> WrittenShard:
        written = close(self)
        for path in (tmp_path / "set" / "shards").iterdir():
            path.write_bytes(path.read_bytes()[:-512])  # what a disk that loses a write would leave
        return written

    monkeypatch.setattr(ShardWriter, "close", lossy)
    with pytest.raises(OSError, match=r"must read back, got \d+ with .*; check the disk"):
        run(config_of(tmp_path, weights))
    assert [path for path in (tmp_path / "set").rglob("*") if path.is_file()] == []


def test_samples_that_were_read_count_until_their_unit_is_done(tmp_path: Path, weights: Path) -> None:
    write_tar(tmp_path / "00000.tar", [member for number in range(3) for member in sample_members(number)])
    config = config_of(tmp_path, weights)
    plan = make_source(config.source, s3=config.s3).plan()
    digest = Tokenizer.load(config.tokenizer).fingerprint.digest
    tokenizer = UnitTokenizer(config, keys=plan.keys, fingerprint_digest=digest)
    for number in range(2):
        assert tokenizer.num_read() == 0
        record = tokenizer.run(plan.units[0]).record
        assert record.counts.num_read == 3, number
    (tmp_path / "00000.tar").unlink()
    with pytest.raises((ArtifactError, OSError)):
        tokenizer.run(plan.units[0])
    assert tokenizer.num_read() == 0


def test_a_torn_tar_commits_nothing(tmp_path: Path, weights: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [member for number in range(9) for member in sample_members(number)])
    path.write_bytes(path.read_bytes()[: 12 * 1024])
    with pytest.raises(ArtifactError, match=r"00000\.tar"):
        run(config_of(tmp_path, weights))
    assert [path for path in (tmp_path / "set").rglob("*") if path.is_file()] == []


def test_other_weights_on_a_worker_are_refused(tmp_path: Path, weights: Path) -> None:
    write_tar(tmp_path / "00000.tar", sample_members(0))
    config = config_of(tmp_path, weights)
    with pytest.raises(ArtifactError, match="must be 0123456789abcdef everywhere"):
        UnitTokenizer(
            config, keys=make_source(config.source, s3=config.s3).plan().keys, fingerprint_digest="0123456789abcdef"
        )


@pytest.mark.parametrize(
    ("width_px", "height_px", "expected"),
    [(32, 32, None), (31, 64, "min_side_px"), (64, 31, "min_side_px"), (96, 32, None), (97, 32, "max_aspect_ratio")],
)
def test_rules_are_inclusive_at_their_limit(width_px: int, height_px: int, expected: str | None) -> None:
    assert broken_rule(width_px, height_px, rules=RulesConfig(min_side_px=32, max_aspect_ratio=3.0)) == expected


def test_a_network_that_does_not_run_is_the_workers_fault_and_no_units(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "00000.tar", sample_members(0))
    config = config_of(tmp_path, weights)
    compiled = config.tokenizer.model_copy(update={"compile_mode": "default"})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # nothing compiled before is found
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/bin/false",)}),  # type: ignore[attr-defined]
        pytest.raises(
            RuntimeError,
            match=r"a first batch: tokenizer .*tiny.* must run with batch_size 4, dtype float32, compile_mode default, "
            r"got InductorError: InvalidCxxCompiler: .*; mend that or change the setting",
        ),
    ):
        run(config.model_copy(update={"tokenizer": compiled}))
    assert not (tmp_path / "set").exists()
