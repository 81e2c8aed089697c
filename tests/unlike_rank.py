"""One rank of a start in which rank 1 differs: `torchrun ... tests/unlike_rank.py SPEC.json FIELD=VALUE DIRECTORY`.

Every rank writes the error that ends it to DIRECTORY/RANK.
"""

import json
import os
import sys
from pathlib import Path

from training.config import TrainConfig
from training.loop import train

rank = os.environ["RANK"]
spec = json.loads(Path(sys.argv[1]).read_text())
if rank == "1":
    name, _, value = sys.argv[2].partition("=")
    *sections, field = name.split(".")
    section = spec
    for each in sections:
        section = section[each]
    section[field] = json.loads(value)
try:
    train(TrainConfig.model_validate(spec))
except ValueError as error:
    (Path(sys.argv[3]) / rank).write_text(str(error))
sys.stdout.flush()
os._exit(0)
