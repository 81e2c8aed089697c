"""A Ray session: embedded in this process, or joined.

`address: local` never follows a stale session of somebody else's and takes its Ray processes down with this one, also
after a SIGKILL. Workers run the code of this process, whatever lies in its directory, and SIGTERM stays with whoever
listens to it. Quiet by choice: no dashboard, no usage statistics, no metrics export; token authentication stays on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import ray

from pipeline.config import ClusterConfig
from pipeline.sigterm import kept_sigterm

OBJECT_STORE_BYTES = 200 * 2**20
"""Shared memory of an embedded session; our tasks pass paths and counts, never images."""
CONNECT_TIMEOUT_S = 10.0
CODE_DIRECTORY = Path(__file__).parents[1]
"""Where this process has our packages from."""
BUSY_SIGNS = ("timed out during startup", "Failed to connect to GCS")
"""What Ray's errors say when its own limits of about 30 s passed while its processes were starting."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_session(config: ClusterConfig, *, log_to_driver: bool = False) -> Iterator[None]:
    """Run the body inside a Ray session; one that is already open in this process is used and left open.

    Args:
        config: the address and the size; an embedded session offers at least the CPUs that its workers ask for.
        log_to_driver: whether what workers print appears here.

    Raises:
        ConnectionError: no cluster answers at the address; the message says what to do.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")  # its exporter needs the dashboard agent
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # ours have an environment, so none would be used
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a GPU-less worker keeps its environment
    # Ray runs workers at nice 15, where anything else that runs on the machine starves them; here they are the job.
    os.environ.setdefault("RAY_worker_niceness", "0")

    if ray.is_initialized():
        yield
        return
    # Ray switches its token authentication on by itself for a new session and then warns that it did.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Workers look for code first in the directory that the session was begun in, also on other machines that have it.
    with kept_sigterm(), contextlib.chdir(CODE_DIRECTORY):
        if config.address == "local":
            _start_local(config, log_to_driver=log_to_driver)
        else:
            _join(config.address, log_to_driver=log_to_driver)
    logger.info("ray session: address=%s num_workers=%d", config.address, config.num_workers)
    try:
        yield
    finally:
        ray.shutdown()


def check_own_node(config: ClusterConfig) -> None:
    """Check that an embedded session has its node: nothing brings a dead one back, and work would wait for ever.

    Raises:
        ConnectionError: it is dead.
    """
    if config.address == "local" and not any(node["Alive"] for node in ray.nodes()):
        raise ConnectionError(
            "ray session: the Ray that this job started must stay alive, got its node dead (killed, or a minute "
            "without a core to run on); run the same command again, what is committed is kept"
        )


def _join(address: str, *, log_to_driver: bool) -> None:
    """Join a cluster. Ray itself would wait for minutes at an address where nobody listens."""
    advice = (
        "check cluster.address, start a cluster there (ray start --head), set RAY_AUTH_MODE=token and bring its token "
        "file if it asks for one, or set cluster.address: local"
    )
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
    except (OSError, UnicodeError) as error:  # Ray's ConnectionError included; and what is no host's name
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".").lower()
        raise ConnectionError(
            f"join ray cluster: a cluster must answer at {address!r}, got {reason}; {advice}"
        ) from error


def _start_local(config: ClusterConfig, *, log_to_driver: bool) -> None:
    """Start an embedded session; again where a busy machine let Ray's own start-up limits pass."""
    num_cpus = max(os.cpu_count() or 1, math.ceil(config.num_workers * config.cpus_per_worker) + 1)
    for is_last_attempt in (False, False, True):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                log_to_driver=log_to_driver,
            )
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            if is_last_attempt or not any(sign in str(error) for sign in BUSY_SIGNS):
                raise
            logger.warning("ray session: start-up timed out, trying again; is the machine very busy?")
