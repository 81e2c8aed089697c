"""What held-out scores say: means with intervals, draft shift, and the distance to a control, all paired by sample.

CE is the mean cross-entropy of offset 0, the code that is kept, in nats. By the kind of drafts in the windows:

    draft_shift  = CE(own drafts) - CE(schedule)        what inference loses against training's windows
    interference = CE(schedule) - CE(control)           what the windows cost the base, or give away to it
    gap          = CE(own drafts) - CE(control)         their sum: the number that counts
    draft_gain   = CE(uninformed) - CE(own drafts)      what the model's own drafts tell it
    interference_uninformed = CE(uninformed) - CE(control)   what the windows cost the base where they give nothing away

Schedule noise leaves codes of the future in the windows, so `interference` may be below 0 where the base has lost
much; `interference_uninformed` has no such help. CE(control) is with the control's own drafts, if it has windows.

N samples, K window_size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pipeline.philox import Int64Array
from training.evaluation.held_out import KINDS
from training.evaluation.intervals import Intervals
from training.evaluation.stages import Arrays


def summarise_held_out(
    model: Arrays, control: Arrays | None, *, intervals: Intervals, groups_N: Int64Array | None = None
) -> dict[str, Any]:
    """Return the means of held-out scores and the differences that matter, as JSON values.

    Args:
        model: of `score_held_out`.
        control: of the same samples; none without a control.
        intervals: makes them.
        groups_N: which samples belong together; none takes them as independent.

    Returns:
        `num_samples`; `model` and `control` by kind, each `loss_of_offset` and `accuracy_of_offset`; `offset_0` by kind
        and the `differences` above, each with its interval.
    """
    loss_0 = {kind: model[f"loss_{kind}"][:, 0] for kind in KINDS}
    differences = {
        "draft_shift": loss_0["own_drafts"] - loss_0["schedule"],
        "draft_gain": loss_0["uninformed"] - loss_0["own_drafts"],
    }
    if control is not None:
        control_N = control["loss_own_drafts"][:, 0]
        differences |= {
            "interference": loss_0["schedule"] - control_N,
            "interference_uninformed": loss_0["uninformed"] - control_N,
            "gap": loss_0["own_drafts"] - control_N,
        }
    of_mean = partial(intervals.of_mean, groups_N=groups_N)
    return {
        "num_samples": len(loss_0["schedule"]),
        "model": _by_kind(model),
        "control": None if control is None else _by_kind(control),
        "offset_0": {kind: of_mean(values_N) for kind, values_N in loss_0.items()},
        "control_offset_0": None if control is None else of_mean(control["loss_own_drafts"][:, 0]),
        "differences": {name: of_mean(values_N) for name, values_N in differences.items()},
    }


def _by_kind(scores: Arrays) -> dict[str, Any]:
    return {
        kind: {
            "loss_of_offset": np.mean(scores[f"loss_{kind}"], axis=0).tolist(),
            "accuracy_of_offset": np.mean(scores[f"accuracy_{kind}"], axis=0).tolist(),
        }
        for kind in KINDS
    }
