"""The numbers of an evaluation that a table of many is made of: flat, each with its interval where it has one."""

from __future__ import annotations

from typing import Any

OF_DRAFTS = ("loss_schedule", "draft_shift", "draft_gain", "interference", "interference_uninformed")
"""What says nothing without drafts: 0, or what another name says."""


def headline_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the headline of a result: `value`, and `low` and `high` where there is an interval, by name.

    Losses are of offset 0 in nats. `_codes` and `_real` are the floors: what real images come to after the tokenizer,
    and as they are; `_to_decoded` is the distance to real images after the tokenizer, which leaves its part out. What
    the evaluation does not have (a control, drafts, training images, captions) is left out.

    Args:
        result: of `evaluation.json`, all but its headline.
    """
    held_out, measures = result["held_out"], result["measures"]
    distance = measures["frechet_distance"]
    left_out = OF_DRAFTS if result["weights"]["window_size"] == 1 else ()
    intervals = {
        "loss_own_drafts": held_out["offset_0"]["own_drafts"],
        "loss_schedule": held_out["offset_0"]["schedule"],
        **held_out["differences"],
        "frechet_distance": distance["samples"],
        "frechet_distance_codes": distance["decoded"],
        "frechet_distance_real": distance["real"],
        "frechet_distance_to_decoded": measures["frechet_distance_to_decoded"]["samples"],
        "kernel_distance": measures["kernel_distance"]["samples"],
        "kernel_distance_to_decoded": measures["kernel_distance_to_decoded"]["samples"],
        "precision": measures["precision"]["samples"],
        "recall": measures["recall"]["samples"],
        "label_score": measures["label_score"]["top_1"]["samples"],
        "caption_score": measures["caption_score"]["top_1"]["samples"] if "caption_score" in measures else None,
    }
    numbers = {
        "flip_rate": result["flips"]["flip_rate"],
        "repeated_share": None if result["memorised"] is None else result["memorised"]["samples"]["share"],
        "backbone_calls_per_image": result["cost"]["backbone_calls_per_image"],
        "seconds_per_image": result["times"]["seconds_per_image"],
    }
    headline = {
        name: {part: interval[part] for part in ("value", "low", "high")}
        for name, interval in intervals.items()
        if interval is not None and name not in left_out
    }
    return headline | {name: {"value": value} for name, value in numbers.items() if value is not None}
