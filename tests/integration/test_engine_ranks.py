"""Two ranks, every ZeRO stage and dtype: discarded steps leave no trace, recomputed activations change nothing."""

import pytest
from training_processes import run_script


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_steps_that_are_not_taken_leave_no_trace_and_recomputed_activations_change_nothing() -> None:
    run_script("skipped_steps.py")
