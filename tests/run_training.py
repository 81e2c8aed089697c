"""One rank of a training run for tests: `torchrun ... tests/run_training.py SPEC.json`.

With UNCHECKED_WEIGHTS=1 a warm start takes weights that are not finite, as no training run does: what went wrong for
some samples only is then known from the start.
"""

import logging
import os
import sys
from pathlib import Path

from jobs.launch import launch_training
from training import weights
from training.config import TrainConfig

if os.environ.get("UNCHECKED_WEIGHTS") == "1":
    weights._check_finite = lambda doing, state: None  # type: ignore[assignment]
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
launch_training(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
