"""A tokenize job in a process of its own, for tests that kill it: `run_tokenize_job.py CONFIG.json`."""

import logging
import sys
from pathlib import Path

from pipeline.config import TokenizeConfig
from pipeline.tokenize import run_tokenize

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    run_tokenize(TokenizeConfig.model_validate_json(Path(sys.argv[1]).read_bytes()), progress=False)
