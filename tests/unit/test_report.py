"""The demo's report from a run directory of three held-out pictures and short made-up curves."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jobs
from jobs.charts import curves_of, limits_of, loss_chart
from jobs.pictures import Pair
from jobs.report import _minutes, write_report
from jobs.run import remember_spec
from jobs.spec import load_spec, shipped_spec
from jobs.timings import StageTime, add_time, read_timings
from pipeline.config import RulesConfig
from pipeline.ledger import Manifest, write_manifest
from pipeline.rejects import Counts
from pipeline.shards import ShardSample, ShardWriter
from pipeline.storage import ArtifactError, open_storage
from tokenization.config import TokenizerConfig, ViewsConfig
from tokenization.tokenizer import Tokenizer

PICTURES = sorted((Path(__file__).parents[1] / "data" / "held_out_emoji").glob("*.png"))[:3]
CLASS_NAMES = ["face & hat", "heart", "time"]


def write_codes(run_dir: Path) -> None:
    tokenizer = Tokenizer.load(TokenizerConfig(weights="open-emoji-64", image_size_px=64, batch_size=4))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in PICTURES])
    (run_dir / "shards").mkdir(parents=True)
    path = run_dir / "shards" / "00000.tar"
    with ShardWriter(path, codebook_size=tokenizer.codebook_size) as writer:
        for index, codes in enumerate(tokenizer.encode(images)):
            metadata = {"source": PICTURES[index].stem, "label": index, "extra": {"class": CLASS_NAMES[index]}}
            metadata["caption"] = f"<picture {index}>"
            writer.add(ShardSample(key=f"0000000{index}", codes_VT=codes[None], metadata=metadata))
        written = writer.close()
    path.with_name("00000.tar.idx").write_bytes(written.index)
    none: dict[str, int] = {}
    counts = Counts(
        num_read=3, num_written=3, num_dropped=0, num_rejected=0, dropped_by_reason=none, rejected_by_reason=none
    )
    manifest = Manifest(
        fingerprint=tokenizer.fingerprint,
        tokenizer=tokenizer.config,
        views=ViewsConfig(),
        rules=RulesConfig(),
        num_samples=3,
        num_views=1,
        codes_per_image=64,
        class_names=CLASS_NAMES,
        shards=[written.info(path.name)],
        poison_units=[],
        totals=counts,
    )
    write_manifest(open_storage(str(run_dir)), manifest)


def write_training(run_dir: Path, *, spec: str, window_size: int) -> None:
    overrides = [f"run_dir={run_dir}", "num_steps=20", "engine.global_batch_size=64"]
    remember_spec(load_spec(shipped_spec(spec), overrides))
    lines = []
    for step in (10, 20):
        losses = [6.0 - step / 20 + offset / 8 for offset in range(window_size)]
        lines.append({"step": step, "split": "train", "loss_of_offset": losses, "samples_per_s": 100.0 + step})
        held_out = {"step": step, "split": "validation", "loss_of_offset": losses, "own_draft_loss_0": 5.25}
        lines.append(held_out)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(run_dir: Path, *, spec: str, window_size: int) -> None:
    overrides = [f"run_dir={run_dir}", "labels=[2, 0]", "num_per_label=2", "sampler.draft_policy=coupled"]
    remember_spec(load_spec(shipped_spec(spec), overrides))
    images = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    np.savez(run_dir / "samples.npz", arr_0=images)
    strip = None
    if window_size > 1:
        strip = "strip.png"
        Image.fromarray(np.zeros((2 * 66 - 2, 4 * 66 - 2, 3), dtype=np.uint8)).save(run_dir / strip)
    record = {"labels": [2, 2, 0, 0], "flip_rate": 0.375 if strip else None, "images_per_s": 2.5, "strip": strip}
    (run_dir / "samples.json").write_text(json.dumps(record | {"strip_sample_indices": [0, 2]}))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    root = tmp_path / "demo"
    write_codes(root / "codes")
    write_codes(root / "codes-validation")
    for index, picture in enumerate(PICTURES):
        folder = tmp_path / "data" / "open-emoji" / "folders" / "validation" / CLASS_NAMES[index]
        folder.mkdir(parents=True)
        shutil.copy(picture, folder)
    for name, window_size in (("base", 1), ("tensorar", 4)):
        write_training(root / name, spec=f"train_{name}", window_size=window_size)
        write_samples(root / f"samples-{name}", spec=f"sample_{name}", window_size=window_size)
    add_time(root, stage="base", seconds_s=80.0, is_finished=False, is_new=True)
    add_time(root, stage="base", seconds_s=45.4, is_finished=True, is_new=False)
    return root


def test_the_page_shows_everything_and_fetches_nothing(demo: Path) -> None:
    path = write_report(demo, data_root=demo.parent / "data")
    page = path.read_text()
    assert path == demo / "report.html"
    # 3 pairs, 2 classes of 2 pictures for each of two models, 2 strips of 4 predictions.
    assert page.count('src="data:image/png;base64,') == 3 * 2 + 2 * 2 * 2 + 2 * 4
    assert page.count("<svg") == 2
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []
    assert "<script" not in page
    assert "&lt;picture 0&gt;" in page
    assert "face &amp; hat" in page
    assert "38 %" in page
    assert "<code>coupled</code>" in page
    assert "2 min 05 s" in page
    assert "20 steps of 64 samples at 115 samples/s" in page
    assert "4 pictures at 2.5 pictures/s" not in page, "a stage without a time has no line"
    assert page.index("face &amp; hat") > page.index("time"), "the classes come in the order of the labels asked for"


def test_the_next_command_names_the_shipped_spec_from_any_directory(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = write_report(demo, data_root=demo.parent / "data").read_text()
    spec = Path(jobs.__file__).parent / "specs" / "sample_tensorar.yaml"
    assert f"tensorar run {spec} --set weights={demo}/tensorar" in page


def test_the_page_is_the_same_when_written_again(demo: Path) -> None:
    first = write_report(demo, data_root=demo.parent / "data").read_bytes()
    assert write_report(demo, data_root=demo.parent / "data").read_bytes() == first


def test_a_missing_stage_is_told(demo: Path) -> None:
    (demo / "samples-base" / "samples.json").unlink()
    with pytest.raises(
        ArtifactError, match=r"samples\.json must be there; run the stage that writes it: tensorar demo"
    ):
        write_report(demo, data_root=demo.parent / "data")


def test_times_of_a_stage_add_up_until_it_is_finished(demo: Path) -> None:
    assert read_timings(demo) == {"base": StageTime(seconds_s=125.4, is_finished=True)}
    add_time(demo, stage="base", seconds_s=3.0, is_finished=True, is_new=False)
    assert read_timings(demo)["base"].seconds_s == 125.4, "looking whether there is anything to do is not its work"
    add_time(demo, stage="base", seconds_s=3.0, is_finished=False, is_new=True)
    assert read_timings(demo) == {"base": StageTime(seconds_s=3.0, is_finished=False)}


def test_curves_are_one_per_offset_and_split_and_the_own_drafts() -> None:
    lines = [
        {"step": 1, "split": "train", "loss_of_offset": [6.0, 6.5]},
        {"step": 2, "split": "train", "loss_of_offset": [5.0, 5.5]},
        {"step": 3, "split": "train", "loss_of_offset": [None, None]},  # skipped
        {"step": 2, "split": "validation", "loss_of_offset": [5.25, 5.75], "own_draft_loss_0": 5.5},
    ]
    curves = curves_of(lines)
    assert [(curve.kind, curve.colour_index, list(curve.steps), list(curve.values)) for curve in curves] == [
        ("train", 0, [1, 2], [6.0, 5.0]),
        ("validation", 0, [2], [5.25]),
        ("train", 1, [1, 2], [6.5, 5.5]),
        ("validation", 1, [2], [5.75]),
        ("own_drafts", 4, [2], [5.5]),
    ]
    limits = limits_of(curves)
    assert limits == pytest.approx((4.91, 6.59))
    svg = loss_chart(curves, title="curves", limits=limits)
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "offset 0 after own drafts, held out" in svg


def test_psnr_of_a_pair() -> None:
    black = np.zeros((2, 2, 3), dtype=np.uint8)
    pair = Pair(source="a", caption="a", class_name="c", original_HWC=black, decoded_HWC=black + 51)
    assert pair.psnr_db == pytest.approx(13.979, abs=1e-3)  # 20 log10(255 / 51)


def test_psnr_of_a_perfect_pair_is_finite() -> None:
    black = np.zeros((2, 2, 3), dtype=np.uint8)
    pair = Pair(source="a", caption="a", class_name="c", original_HWC=black, decoded_HWC=black)
    assert pair.psnr_db == pytest.approx(78.131, abs=1e-3)  # 20 log10(255) + 30


def test_times_are_rounded_before_they_are_split_into_minutes() -> None:
    assert [_minutes(seconds_s) for seconds_s in (0.04, 59.94, 59.96, 119.7, 125.4)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "2 min 00 s",
        "2 min 05 s",
    ]
