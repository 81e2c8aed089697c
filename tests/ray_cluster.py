"""A Ray cluster of two nodes on this machine, one of which tests lose."""

import contextlib
import os
from collections.abc import Iterator

from ray.cluster_utils import Cluster

QUICK_TO_NOTICE = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 200}
"""A lost node is noticed within a second or two; by Ray's defaults it takes ten, in which a job does nothing there."""


@contextlib.contextmanager
def running_cluster(*, head_cpus: int, second_node_cpus: int) -> Iterator[Cluster]:
    """Start a head and a second node with room for so many workers; all inherit this process's environment."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else whatever else runs on the machine starves the workers
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "_system_config": QUICK_TO_NOTICE})
    try:
        cluster.add_node(num_cpus=second_node_cpus)
        yield cluster
    finally:
        cluster.shutdown()


def second_raylet(cluster: Cluster) -> int:
    """Return the process id of the second node's raylet, whose children are the node's workers."""
    (node,) = cluster.worker_nodes
    return int(node.all_processes["raylet"][0].process.pid)


def lose_second_node(cluster: Cluster) -> None:
    """SIGKILL everything of the second node but its workers, which Ray ends once their raylet is gone."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
