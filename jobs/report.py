"""The demo's report: one self-contained HTML page of what the runs left on disk.

Reads artifacts only (manifests, shards, metrics, samples, timings), so it can be written again at any time, also after
single stages were run by hand. No script, nothing fetched: it opens from a mail as well as from the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from jobs.charts import Curve, curves_of, limits_of, loss_chart
from jobs.pages import class_name, render_page
from jobs.pictures import Pair, data_uri, held_out_pairs
from jobs.run import SPEC_NAME
from jobs.spec import from_here, shipped_spec
from jobs.timings import read_timings
from pipeline.ledger import read_manifest
from pipeline.local_storage import write_bytes
from pipeline.storage import ArtifactError, open_storage
from training.metrics import read_metrics
from training.sample import GAP_PX

NUM_PAIRS = 14
PICTURES_PER_CLASS = 6
REPORT_NAME = "report.html"
ALREADY_THERE_S = 0.2
STAGE_TITLES = {
    "corpus": "corpus: fetch and render",
    "tokenize": "tokenize the training corpus",
    "tokenize_validation": "tokenize the held-out corpus",
    "base": "train the base model",
    "tensorar": "train TensorAR",
    "sample_base": "sample the base model",
    "sample_tensorar": "sample TensorAR",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training run left."""

    spec: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def curves(self) -> list[Curve]:
        """Its loss curves."""
        return curves_of(self.metrics)

    def last(self, name: str) -> float | None:
        """The last held-out value of a measure; `loss_0` is that of offset 0."""
        lines = [line for line in self.metrics if line["split"] == "validation"]
        if not lines:
            return None
        value = lines[-1]["loss_of_offset"][0] if name == "loss_0" else lines[-1].get(name)
        return None if value is None else float(value)

    @property
    def samples_per_s(self) -> float | None:
        """Median training throughput."""
        values = [line["samples_per_s"] for line in self.metrics if line.get("samples_per_s")]
        return float(np.median(values)) if values else None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What one sample job left."""

    spec: dict[str, Any]
    record: dict[str, Any]
    images_NHWC: np.ndarray[Any, np.dtype[np.uint8]]
    directory: Path

    def of_class(self, index: int) -> list[str]:
        """Data URIs of the first pictures of the n-th label asked for."""
        per_label = int(self.spec["num_per_label"])
        begin = index * per_label
        count = min(per_label, PICTURES_PER_CLASS)
        return [data_uri(image) for image in self.images_NHWC[begin : begin + count]]


def write_report(run_root: Path, *, data_root: Path) -> Path:
    """Path of the written report.

    Args:
        run_root: The demo's runs.
        data_root: Where its corpus lies.

    Raises:
        ArtifactError: a stage has not left its results yet.
    """
    runs = {name: _read_run(run_root / name) for name in ("base", "tensorar")}
    pictures = {name: _read_pictures(run_root / f"samples-{name}") for name in ("base", "tensorar")}
    pairs = held_out_pairs(
        run_root / "codes-validation", images_dir=data_root / "open-emoji" / "folders" / "validation"
    )
    shown = [
        {"pair": pair, "original": data_uri(pair.original_HWC), "decoded": data_uri(pair.decoded_HWC)}
        for pair in _spread(pairs)
    ]
    page = render_page(
        "report.html.j2",
        facts=_facts(run_root, runs, pictures["tensorar"], pairs),
        pairs=shown,
        psnr_db=float(np.mean([pair.psnr_db for pair in pairs])),
        num_pairs=len(pairs),
        charts=_charts(runs),
        losses=_losses(runs),
        classes=_classes(run_root, pictures),
        strips=_strips(run_root, pictures["tensorar"]),
        tensorar=pictures["tensorar"],
        window_size=runs["tensorar"].spec["model"]["window_size"],
        num_extra_steps=runs["tensorar"].spec["num_steps"],
        times=_times(run_root, runs, pictures),
        files=_files(run_root, data_root),
        run_root=run_root,
        sample_spec=from_here(shipped_spec("sample_tensorar")),
    )
    path = run_root / REPORT_NAME
    write_bytes(path, page.encode())
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(
            f"report {path.parent}: {path.name} must be there; run the stage that writes it: tensorar demo"
        )
    return dict(json.loads(path.read_text()))


def _read_run(directory: Path) -> Run:
    return Run(spec=_read_json(directory / SPEC_NAME), metrics=read_metrics(directory))


def _read_pictures(directory: Path) -> Pictures:
    record = _read_json(directory / "samples.json")
    with np.load(directory / "samples.npz", allow_pickle=False) as arrays:
        images_NHWC = arrays["arr_0"]
    return Pictures(spec=_read_json(directory / SPEC_NAME), record=record, images_NHWC=images_NHWC, directory=directory)


def _spread(pairs: list[Pair]) -> list[Pair]:
    count = min(NUM_PAIRS, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _facts(run_root: Path, runs: dict[str, Run], pictures: Pictures, pairs: list[Pair]) -> list[dict[str, str]]:
    manifest = read_manifest(open_storage(str(run_root / "codes")))
    facts = [
        {"value": f"{manifest.num_samples:,}", "name": "images tokenized", "note": f"{manifest.num_views} views each"},
        {"value": f"{np.mean([pair.psnr_db for pair in pairs]):.1f} dB", "name": "tokenizer, held out", "note": "PSNR"},
    ]
    for name, title in (("base", "base model"), ("tensorar", "TensorAR")):
        if (loss := runs[name].last("own_draft_loss_0")) is not None:
            facts.append({"value": f"{loss:.2f}", "name": f"{title}, held out", "note": "nats per kept code"})
    if (flip_rate := pictures.record.get("flip_rate")) is not None:
        policy = pictures.spec["sampler"]["draft_policy"]
        facts.append({"value": f"{flip_rate:.0%}", "name": "codes revised", "note": f"flip rate, {policy} drafts"})
    total_s = sum(time.seconds_s for time in read_timings(run_root).values())
    if total_s:
        facts.append({"value": _minutes(total_s), "name": "all stages", "note": "wall time"})
    return facts


def _charts(runs: dict[str, Run]) -> dict[str, Markup]:
    curves = {name: run.curves for name, run in runs.items()}
    limits = limits_of([curve for group in curves.values() for curve in group])
    # The SVG is ours, made of numbers; everything else on the page is escaped.
    return {
        name: Markup(loss_chart(group, title=f"loss curves of the {name} run", limits=limits))
        for name, group in curves.items()
    }


def _losses(runs: dict[str, Run]) -> list[dict[str, Any]]:
    titles = {"base": "base model", "tensorar": "TensorAR"}
    return [
        {"name": titles[name], "schedule": run.last("loss_0"), "own_drafts": run.last("own_draft_loss_0")}
        for name, run in runs.items()
    ]


def _classes(run_root: Path, pictures: dict[str, Pictures]) -> list[dict[str, Any]]:
    names = read_manifest(open_storage(str(run_root / "codes"))).class_names
    labels: list[int] = pictures["base"].spec["labels"]
    if labels != pictures["tensorar"].spec["labels"]:
        raise ArtifactError(
            f"report {run_root}: both sample runs must have the same labels, got {labels} and "
            f"{pictures['tensorar'].spec['labels']}; run them with equal labels"
        )
    return [
        {
            "name": class_name(names, label),
            "base": pictures["base"].of_class(index),
            "tensorar": pictures["tensorar"].of_class(index),
        }
        for index, label in enumerate(labels)
    ]


def _strips(run_root: Path, pictures: Pictures) -> list[dict[str, Any]]:
    """Lines of the refinement strip: the class, and the pictures from first drafts to kept codes."""
    if pictures.record.get("strip") is None:
        return []
    names = read_manifest(open_storage(str(run_root / "codes"))).class_names
    strip = np.asarray(Image.open(pictures.directory / pictures.record["strip"]).convert("RGB"))
    side = pictures.images_NHWC.shape[1]
    step = side + GAP_PX
    lines = []
    for index, sample_index in enumerate(pictures.record["strip_sample_indices"]):
        label = pictures.record["labels"][sample_index]
        pixels = strip[index * step : index * step + side]
        uris = [data_uri(pixels[:, left : left + side]) for left in range(0, pixels.shape[1], step)]
        lines.append({"name": class_name(names, label), "uris": uris})
    return lines


def _times(run_root: Path, runs: dict[str, Run], pictures: dict[str, Pictures]) -> list[dict[str, str]]:
    timings = {stage: time.seconds_s for stage, time in read_timings(run_root).items()}
    notes = {
        "corpus": "was there already" if timings.get("corpus", 0.0) < ALREADY_THERE_S else "pictures with captions"
    }
    for stage, name in (("tokenize", "codes"), ("tokenize_validation", "codes-validation")):
        manifest = read_manifest(open_storage(str(run_root / name)))
        num_images = manifest.num_samples * manifest.num_views
        notes[stage] = f"{num_images:,} views" + _rate(num_images, timings.get(stage), "views/s, start of Ray included")
    for name, run in runs.items():
        steps, batch = run.spec["num_steps"], run.spec["engine"]["global_batch_size"]
        speed = f" at {run.samples_per_s:.0f} samples/s" if run.samples_per_s else ""
        notes[name] = f"{steps:,} steps of {batch} samples{speed}"
    for name, made in pictures.items():
        stage = f"sample_{name}"
        notes[stage] = f"{len(made.images_NHWC)} pictures" + _rate(
            len(made.images_NHWC), timings.get(stage), "pictures/s"
        )
    return [
        {"name": title, "time": _minutes(timings[stage]), "note": notes.get(stage, "")}
        for stage, title in STAGE_TITLES.items()
        if stage in timings
    ]


def _rate(count: int, seconds_s: float | None, unit: str) -> str:
    return f", {count / seconds_s:,.0f} {unit}" if seconds_s else ""


def _minutes(seconds_s: float) -> str:
    minutes, seconds = divmod(round(seconds_s), 60)
    return f"{seconds_s:.1f} s" if seconds_s < 59.95 else f"{minutes} min {seconds:02d} s"


def _files(run_root: Path, data_root: Path) -> list[dict[str, str]]:
    meanings = (
        (data_root / "open-emoji", "the corpus: tars/, folders/, classes.txt, NOTICE.txt"),
        (run_root / "codes", "shards of codes, ledger, manifest; preview.html shows them"),
        (run_root / "codes-validation", "the same, held out"),
        (run_root / "base", "base model: checkpoints, metrics.jsonl, tensorboard/"),
        (run_root / "tensorar", "TensorAR: the same"),
        (
            run_root / "samples-base",
            "pictures of the base model: grid.png, images/, codes.npy, samples.npz, samples.json",
        ),
        (run_root / "samples-tensorar", "pictures of TensorAR: the same, and strip.png"),
    )
    return [{"path": str(path), "size": _size(path), "meaning": meaning} for path, meaning in meanings if path.is_dir()]


def _size(directory: Path) -> str:
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return f"{num_bytes / 2**20:.1f} MiB"
