"""One rank of a training run, without a launcher: `torchrun ... tests/train_rank.py SPEC.json`."""

import logging
import os
import sys
from pathlib import Path

from training.config import TrainConfig
from training.loop import train

logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
sys.stdout.flush()
os._exit(0)  # gloo may abort a process while it exits
