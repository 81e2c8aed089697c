"""Where a run keeps what is not a checkpoint: metrics.jsonl, tensorboard/ and logs/.

Light: imports no torch.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from pipeline.local_storage import local_path


def local_run_dir(run_dir: str) -> Path:
    """Return the directory that a run's metrics and logs are written in while it runs, made where it is missing.

    Args:
        run_dir: of the spec; a directory is its own, an `s3://` URL has one below TMPDIR, the same for all processes of
            a machine.
    """
    if "://" in run_dir:
        name = hashlib.sha256(run_dir.rstrip("/").encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"tensorar-run-{name}"
    else:
        path = local_path(run_dir).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path
