"""One rank of a training run for tests: `torchrun ... tests/run_training.py SPEC.json`."""

import logging
import sys
from pathlib import Path

from jobs.launch import launch_training
from training.config import TrainConfig

logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
launch_training(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
