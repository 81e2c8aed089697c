"""How a rank learns that it should stop, without asking the other ranks."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2.api.preemption import PreemptionInfo

from jobs import stopping
from jobs.ray_ranks import health_check_interval_s
from jobs.stopping import RankStop


def flag_of_a_launcher_that_is_gone() -> SimpleNamespace:
    def wait() -> None:
        raise ray.exceptions.RayError

    return SimpleNamespace(wait=SimpleNamespace(remote=wait))


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> Iterator[PreemptionContext]:
    """Where Ray Train puts this rank's notice; no session is open, so that nobody else can be asked."""
    monkeypatch.setattr(stopping, "PREEMPTION_POLL_S", 0.01)
    notices = PreemptionContext()
    context.set_train_context(SimpleNamespace(preemption_context=notices))
    yield notices
    notices.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"last": [0]})  # ends the thread
    context.set_train_context(None)


def test_a_rank_stops_by_the_notice_that_it_was_given(notices: PreemptionContext) -> None:
    stop = RankStop(flag_of_a_launcher_that_is_gone(), watches_preemption=True)
    time.sleep(0.1)
    assert not stop.is_told()
    assert stop.preempted_nodes == ()
    notices.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0], "b": [5]})
    deadline = time.monotonic() + 10
    while not stop.is_told() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.is_told()
    assert set(stop.preempted_nodes) == {"a", "b"}


def test_a_rank_that_others_stopped_first_names_the_nodes_too(notices: PreemptionContext) -> None:
    stop = RankStop(flag_of_a_launcher_that_is_gone(), watches_preemption=True)
    notices.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert stop.preempted_nodes == ("a",)  # whether or not its own thread has looked


def test_a_rank_that_others_stopped_waits_for_its_own_notice(notices: PreemptionContext) -> None:
    stop = RankStop(flag_of_a_launcher_that_is_gone(), watches_preemption=True)
    notice = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    threading.Timer(0.2, setattr, (notices, "preemption_info", notice)).start()
    stop.wait_until_told(10)
    assert stop.preempted_nodes == ("a",)


def test_without_a_cluster_there_are_no_notices(notices: PreemptionContext) -> None:
    stop = RankStop(flag_of_a_launcher_that_is_gone(), watches_preemption=False)
    notices.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert stop.preempted_nodes == ()


@pytest.mark.parametrize(("num_ranks", "checks_per_s"), [(2, 10), (32, 160), (1024, 500), (8192, 500)])
def test_a_controller_is_not_asked_to_take_in_more_answers_with_ever_more_ranks(
    num_ranks: int, checks_per_s: float
) -> None:
    assert num_ranks / health_check_interval_s(num_ranks) == pytest.approx(checks_per_s)
