"""Keeps another Ray on the machine from ending the ranks.

Ray Train 2.60 has a watcher remove the ranks' placement group once their controller is dead. It asks a dashboard: the
one at the port that every Ray takes first. An embedded session has none, so another session's may answer, to which the
controller is as good as dead. Here the watcher asks its own session's control store. It stays, since without it the
ranks of a lost controller would keep their resources until the launcher ends.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2.api import data_parallel_trainer


def _is_actor_alive(actor_id: str, timeout: float) -> bool:
    actor = ray._private.state.actors(actor_id)
    return bool(actor) and actor["State"] != "DEAD"


class _Cleaner(placement_group_cleaner.PlacementGroupCleaner):  # type: ignore[misc]  # Ray carries no types
    """The watcher, an actor with a process of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        placement_group_cleaner.is_actor_alive = _is_actor_alive
        super().__init__(*args, **options)


class _CleanerCallback(placement_group_callback.PlacementGroupCleanerCallback):  # type: ignore[misc]
    """Starts that watcher, inside the controller's process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        placement_group_callback.PlacementGroupCleaner = _Cleaner
        super().after_controller_start(train_run_context)


def watch_own_session() -> None:
    """Have the trainers of this process watched that way; called before `fit`."""
    data_parallel_trainer.PlacementGroupCleanerCallback = _CleanerCallback
