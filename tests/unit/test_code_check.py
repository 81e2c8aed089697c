"""Codes encoded again: samples are found by their names where the corpus was made anew in another order."""

from pathlib import Path

import pytest
from toy_corpus import sample_members, tokenize_config, tokenize_here, write_tar, write_tiny_tokenizer

from pipeline.code_check import CodeCheck, check_codes
from pipeline.config import S3Config
from pipeline.ledger import read_record, write_manifest
from pipeline.resume import with_begun_keys
from pipeline.retry import append_units, plan_retries, write_planned
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError, Storage, open_storage
from pipeline.tally import Tally
from pipeline.tokenize import make_manifest
from pipeline.worker import UnitTokenizer
from tokenization.tokenizer import Tokenizer


def write_samples(root: Path, *numbers: int) -> None:
    write_tar(root / "a.tar", [member for number in numbers for member in sample_members(number)])


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A finished set of one tar of six samples; a sample has 16 codes."""
    write_samples(tmp_path, 0, 1, 2, 3, 4, 5)
    source = {"kind": "webdataset", "urls": [str(tmp_path / "a.tar")]}
    config = tokenize_config(tmp_path / "set", source=source, weights=write_tiny_tokenizer(tmp_path / "t.safetensors"))
    tokenize_here(config)
    (tmp_path / "set" / "spec.json").write_text(config.model_dump_json())
    return open_storage(str(tmp_path / "set"))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (9, 3, 0, 4, 1, 5, 2)])
def test_samples_are_found_by_name_in_any_order(storage: Storage, tmp_path: Path, order: tuple[int, ...]) -> None:
    write_samples(tmp_path, *order)
    assert check_codes(storage, s3=S3Config()) == CodeCheck(num_samples=6, num_codes=96, num_differing=0)


def test_a_sample_that_is_gone_is_named(storage: Storage, tmp_path: Path) -> None:
    write_samples(tmp_path, 0, 1, 2, 4, 5, 6)
    with pytest.raises(ArtifactError, match=r"a\.tar must still hold s0003 as it was, got gone: .*; put the corpus"):
        check_codes(storage, s3=S3Config())


def test_retried_samples_are_found_by_keys_as_wide_as_the_set_was_begun_with(tmp_path: Path) -> None:
    """Not as wide as its corpus, which has grown, would ask for."""
    write_tar(tmp_path / "0.tar", sample_members(9))
    write_tar(tmp_path / "a.tar", [*sample_members(0), ("s0001.png", b"no image"), *sample_members(2)])
    source_config = {"kind": "webdataset", "urls": [f"{tmp_path}/{name}.tar" for name in "0a"]}
    weights = write_tiny_tokenizer(tmp_path / "t.safetensors")
    config = tokenize_config(tmp_path / "set", source=source_config, weights=weights)
    tokenize_here(config)
    write_samples(tmp_path, *range(30))
    storage, source = open_storage(str(tmp_path / "set")), make_source(config.source, s3=config.s3)
    plan = with_begun_keys(storage, source.plan())
    planned = plan_retries(storage, plan, max_image_pixels=10_000)
    write_planned(storage, planned, keys=plan.keys)
    plan, tokenizer = append_units(plan, planned), Tokenizer.load(config.tokenizer)
    UnitTokenizer(config, keys=plan.keys, fingerprint_digest=tokenizer.fingerprint.digest).run(plan.units[2])
    tally = Tally()
    for stem in ("00000", "00001", "00002"):
        tally.add(read_record(storage, stem))
    write_manifest(storage, make_manifest(config, plan=plan, tokenizer=tokenizer, tally=tally, poison=[]))
    (tmp_path / "set" / "spec.json").write_text(config.model_dump_json())
    assert check_codes(storage, s3=S3Config()) == CodeCheck(num_samples=4, num_codes=64, num_differing=0)
