"""The ranks of a training run: joining them, and the few collectives on Python values that are not DeepSpeed's.

Needs only torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); a process group
that Ray Train has already made is used as it is. Gloo on CPU, NCCL on CUDA. Collectives here carry small Python
values (paths, hashes) and are called a few times per checkpoint; the one of every step is `sum`.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

logger = logging.getLogger(__name__)

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LEAST_TIMEOUT_S = 120.0
_DRAIN_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the ranks of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes what only one may write."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def from_first(self, value: Any) -> Any:
        """Return rank 0's `value` (a small picklable) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` summed over the ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def collective_timeout(step_timeout_s: float) -> datetime.timedelta:
    """Return how long a collective may take: longer than a watched step, whose watchdog can say which rank hangs."""
    return datetime.timedelta(seconds=max(_LEAST_TIMEOUT_S, 2 * step_timeout_s))


def join_ranks(*, step_timeout_s: float = 600.0) -> Ranks:
    """Return this process's place, having joined the process group.

    Args:
        step_timeout_s: of the run; sets the timeout of a process group that is made here.

    Raises:
        ValueError: torchrun's environment variables are missing.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"join ranks: {', '.join(_VARIABLES)} must be set, got no {', '.join(missing)}; start with torchrun "
            f"(torchrun --standalone --nproc-per-node 2 -m jobs.cli run SPEC) or use cluster.launcher: ray"
        )
    has_cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_cuda else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `repeatable_kernels` needs of cuBLAS
    # DeepSpeed calls collectives by names that torch has just renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # Inside the function: DeepSpeed picks its accelerator when it is imported, by the variable just set.
    import deepspeed  # noqa: PLC0415
    import deepspeed.ops  # noqa: PLC0415

    # Even under gloo DeepSpeed compiles this op for 40 s, and fails where there is no compiler (no switch exists).
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if has_cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=collective_timeout(step_timeout_s),
    )
    return Ranks(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), device=device)


def leave_ranks(ranks: Ranks) -> None:
    """Leave after every rank is done, so that no gloo thread outlives the interpreter (it would abort the process)."""
    ranks.barrier()
    gc.collect()
    time.sleep(_DRAIN_S)
