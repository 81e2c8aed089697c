"""The report of an evaluation: one self-contained HTML page of what its job left, local or on S3.

Reads `evaluation.json` and `pictures.npz` only, so it can be written again at any time. No script, nothing fetched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from jobs.evaluation_charts import flip_chart, flip_grid, offset_chart, tuning_chart
from jobs.pages import class_name, render_page
from pipeline.preview import png_data_uri
from pipeline.storage import Storage, open_storage
from training.evaluation.config import EvaluateConfig
from training.evaluation.evaluate import REPORT_NAME, read_evaluation, run_evaluate
from training.evaluation.neighbours import is_near_duplicate
from training.evaluation.pictures import PICTURES_NAME
from training.evaluation.tuning import fields_at_edge

MAX_CLASS_LINES = 40
MEASURES = (
    ("frechet_distance", "Frechet distance", "lower is better; biased upwards, the more the fewer images"),
    ("frechet_distance_to_decoded", "Frechet distance to decoded images", "the model's part, without the tokenizer's"),
    ("kernel_distance", "kernel distance, x 1000", "lower is better; unbiased, so about 0 for equal sets"),
    (
        "kernel_distance_to_decoded",
        "kernel distance to decoded images, x 1000",
        "the same without the tokenizer's part",
    ),
    ("precision", "precision", "share of samples that lie among real images"),
    ("recall", "recall", "share of real images that samples reach"),
    ("density", "density", "precision by how many real images are near; 1 for equal sets"),
    ("coverage", "coverage", "share of real images that have a sample near"),
)
SCORES = (
    ("label_score", "share of images whose class is the nearest"),
    ("caption_score", "share of images whose class's caption is the nearest"),
)
SCALES = {"kernel_distance": 1000.0, "kernel_distance_to_decoded": 1000.0}
LOSSES = (
    ("schedule", "windows noised by the schedule"),
    ("own_drafts", "windows with own drafts"),
    ("uninformed", "windows with uniform drafts"),
)
DIFFERENCES = (
    ("draft_shift", "draft shift", "own drafts - schedule: what inference loses against training's windows"),
    ("interference", "interference", "schedule - control: what the windows cost the base, or give away to it"),
    ("gap", "gap to the control", "own drafts - control: the sum of both, the number that counts"),
    ("draft_gain", "gain from drafts", "uniform drafts - own drafts: what the model's drafts tell it"),
    (
        "interference_uninformed",
        "interference, nothing given away",
        "uniform drafts - control: the cost to the base alone",
    ),
)


def evaluate_and_report(config: EvaluateConfig) -> str:
    """Run an evaluate job to its end; returns the path or URL of its report.

    Args:
        config: The job; what its run_dir already holds is not done again.

    Raises:
        ArtifactError: as `run_evaluate`.
    """
    run_evaluate(config)
    storage = open_storage(config.run_dir, s3=config.s3)
    if storage.find(REPORT_NAME) is None:
        write_evaluation_report(storage)
    return storage.url_of(REPORT_NAME)


def write_evaluation_report(storage: Storage) -> str:
    """Write the page of a finished evaluation; returns its path or URL.

    Args:
        storage: The `run_dir` of an evaluate job.

    Raises:
        ArtifactError: the evaluation is not finished.
    """
    result = read_evaluation(storage)
    with np.load(io.BytesIO(storage.read_bytes(PICTURES_NAME)), allow_pickle=False) as arrays:
        pictures = {name: arrays[name] for name in arrays.files}
    page = render_page(
        "evaluation.html.j2",
        name=storage.url.rpartition("/")[2] or storage.url,
        result=result,
        window_size=result["weights"]["window_size"],
        facts=_facts(result),
        measures=_measures(result),
        losses=_losses(result),
        differences=_differences(result),
        charts=_charts(result),
        at_edge=[] if result["tuning"] is None else fields_at_edge(result["tuning"]),
        grid=_grid(result, pictures),
        strips=_strips(result, pictures),
        nearest=_nearest(result, pictures),
        classes=_classes(result),
        provenance=_provenance(result),
    )
    storage.write_bytes(REPORT_NAME, page.encode())
    return storage.url_of(REPORT_NAME)


def told(interval: dict[str, Any] | None, *, scale: float = 1.0, digits: int = 3) -> dict[str, str]:
    """An interval as text: its value, and from where to where it may lie.

    Args:
        interval: Of `evaluation.json`; none gives dashes.
        scale: What all three numbers are multiplied by.
        digits: Significant digits of the value, up to one decimal more; the ends have as many decimals.
    """
    if interval is None:
        return {"value": "-", "range": ""}
    value, low, high = (scale * interval[name] for name in ("value", "low", "high"))
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))) if value else digits)
    decimals = min(decimals, digits + 1)
    return {"value": f"{value:.{decimals}f}", "range": f"{low:.{decimals}f} to {high:.{decimals}f}"}


def _facts(result: dict[str, Any]) -> list[dict[str, str]]:
    held_out, measures = result["held_out"], result["measures"]
    is_windowed = result["weights"]["window_size"] > 1
    loss = held_out["offset_0"]["own_drafts"]["value"]
    facts = [_fact(f"{loss:.3f}", "held out, own drafts" if is_windowed else "held out", "nats per kept code")]
    if is_windowed:
        facts.append(_fact(f"{held_out['differences']['draft_shift']['value']:+.3f}", "draft shift", "nats"))
    if held_out["control"] is not None:
        gap = held_out["differences"]["gap"]["value"]
        facts.append(_fact(f"{gap:+.3f}", "gap to the control", "nats; below 0 is better"))
    distance = measures["frechet_distance"]
    floor = f"codes {distance['decoded']['value']:.0f}, real {distance['real']['value']:.0f}"
    facts.append(_fact(f"{distance['samples']['value']:.0f}", "Frechet distance", f"floors: {floor}"))
    if (flip_rate := result["flips"]["flip_rate"]) is not None:
        facts.append(_fact(f"{flip_rate:.0%}", "flip rate", f"{result['flips']['draft_policy']} drafts"))
    calls = result["cost"]["backbone_calls_per_image"]
    facts.append(_fact(f"{calls:.1f}", "backbone calls", f"{result['times']['seconds_per_image']:.3f} s per image"))
    return facts


def _fact(value: str, name: str, note: str) -> dict[str, str]:
    return {"value": value, "name": name, "note": note}


def _measures(result: dict[str, Any]) -> list[dict[str, Any]]:
    measures = result["measures"]
    lines = [
        {
            "name": title,
            "note": note,
            **{of: told(measures[name].get(of), scale=SCALES.get(name, 1.0)) for of in ("samples", "decoded", "real")},
        }
        for name, title, note in MEASURES
    ]
    for kind, first in SCORES:
        for top, note in (("top_1", first), ("top_5", "... or among the nearest five")) if kind in measures else ():
            scores = {of: told(measures[kind][top].get(of)) for of in ("samples", "decoded", "real")}
            lines.append({"name": f"{kind.replace('_', ' ')}, top {top[-1]}", "note": note, **scores})
    return lines


def _losses(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each kind of drafts, one in all without windows, and the control's."""
    held_out = result["held_out"]
    kinds = LOSSES if result["weights"]["window_size"] > 1 else (("schedule", "no drafts: window_size 1"),)
    lines = [{"name": words, **told(held_out["offset_0"][kind], digits=4)} for kind, words in kinds]
    if held_out["control"] is not None:
        lines.append({"name": "control", **told(held_out["control_offset_0"], digits=4)})
    return lines


def _differences(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = result["held_out"]["differences"]
    if result["weights"]["window_size"] == 1:  # without drafts the others are 0, or the gap again
        found = {name: interval for name, interval in found.items() if name == "gap"}
    return [{"name": title, "note": note, **told(found[name])} for name, title, note in DIFFERENCES if name in found]


def _charts(result: dict[str, Any]) -> dict[str, Markup]:
    held_out, flips = result["held_out"], result["flips"]
    charts = {}
    if result["weights"]["window_size"] > 1:
        charts["loss"] = offset_chart(held_out, measure="loss_of_offset", label="cross-entropy, nats per code")
        charts["accuracy"] = offset_chart(held_out, measure="accuracy_of_offset", label="accuracy")
    if flips["flip_rate"] is not None:
        charts["flip_grid"] = flip_grid(flips["of_position"])
        if any(share is not None for share in flips["of_offset"]):  # a stride has none
            charts["flips"] = flip_chart(flips["of_offset"])
    if result["tuning"] is not None:
        charts["tuning"] = tuning_chart(result["tuning"])
    # The SVG is ours, made of numbers; everything else on the page is escaped.
    return {name: Markup(svg) for name, svg in charts.items()}


def _grid(result: dict[str, Any], pictures: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    lines, begin = [], 0
    control = pictures.get("control_grid")
    for entry in result["pictures"]["grid"]:
        places = slice(begin, begin + entry["num_pictures"])
        begin = places.stop
        lines.append(
            {
                "name": class_name(result["class_names"], entry["label"]),
                "model": _uris(pictures["grid"][places]),
                "control": None if control is None else _uris(control[places]),
            }
        )
    return lines


def _strips(result: dict[str, Any], pictures: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    labels = result["pictures"]["strip_labels"]
    return [
        {"name": class_name(result["class_names"], label), "uris": _uris(pictures["strips"][index])}
        for index, label in enumerate(labels)
    ]


def _nearest(result: dict[str, Any], pictures: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    pairs = result["pictures"]["nearest"]
    distances_N = np.array([pair["distance"] for pair in pairs])
    threshold = 0.0 if result["memorised"] is None else result["memorised"]["threshold"]
    return [
        {
            "name": class_name(result["class_names"], pair["label"]),
            "distance": f"{pair['distance']:.3f}",
            "is_repeated": is_repeated,
            "sample": png_data_uri(pictures["nearest_samples"][index]),
            "training": png_data_uri(pictures["nearest_training"][index]),
        }
        for index, (pair, is_repeated) in enumerate(
            zip(pairs, is_near_duplicate(distances_N, threshold=threshold).tolist(), strict=True)
        )
    ]


def _classes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a class that has measures of its own, the worst label scores first."""
    measures, scale = result["measures"], SCALES["kernel_distance"]
    scores = measures["label_score"]["top_1_of_class"]
    distances = measures["kernel_distance_of_class"]
    floors = measures.get("kernel_distance_of_class_decoded", {})  # not in results of before
    labels = sorted(scores["samples"], key=lambda label: (scores["samples"][label]["value"], int(label)))
    return [
        {
            "name": class_name(result["class_names"], int(label)),
            "num_samples": scores["samples"][label]["num_samples"][0],
            "score": told(scores["samples"][label]),
            "real_score": told(scores["real"].get(label)),
            "distance": told(distances.get(label), scale=scale),
            "floor": told(floors.get(label), scale=scale),
        }
        for label in labels[:MAX_CLASS_LINES]
    ]


def _provenance(result: dict[str, Any]) -> list[tuple[str, str]]:
    spec, weights, control = result["spec"], result["weights"], result["control"]
    lines = [("weights", _weights(weights))]
    if control is not None:
        lines.append(("control", _weights(control)))
    reference, features = result["reference"], result["features"]
    lines += [
        ("held-out codes", f"{spec['held_out']['shards']}, {result['held_out']['num_samples']} samples"),
        ("noise of held-out windows", _fields(spec["noise"], ("schedule", "end_point", "coupling"))),
        ("real images", f"{reference['num_tuning']} to tune by, {reference['num_report']} reported against"),
        ("samples", f"{result['num_samples']}, labels in proportion to the real images', seed {spec['seed']}"),
        ("sampler", _fields(result["sampler"], tuple(result["sampler"]))),
        ("features", f"{features['network']}, {features['dim']} numbers, weights {features['weights_sha256'][:12]}"),
        ("tokenizer", result["tokenizer_fingerprint"]),
        ("computed on", f"{result['times']['device']}, {spec['dtype']}, batches of {spec['batch_size']}"),
    ]
    return lines


def _weights(weights: dict[str, Any]) -> str:
    size = f"{weights['num_parameters'] / 1e6:.2f} M parameters"
    return f"{weights['path']} (step {weights['step']}, window_size {weights['window_size']}, {size})"


def _fields(values: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if values[name] is not None)


def _uris(images_NHWC: np.ndarray) -> list[str]:
    return [png_data_uri(image_HWC) for image_HWC in images_NHWC]
