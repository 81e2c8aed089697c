"""Joining a Ray cluster: an address at which none answers is one line, whatever it is made of."""

import pytest

from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "a..b:6379"])
def test_an_address_where_nobody_answers_is_named_with_what_to_do(address: str) -> None:
    with pytest.raises(ConnectionError) as caught, ray_session(ClusterConfig(address=address)):
        pass
    told = str(caught.value)
    assert told.startswith(f"join ray cluster: a cluster must answer at {address!r}, got ")
    assert "check cluster.address" in told


def test_an_ipv6_address_is_asked_without_its_brackets() -> None:
    with pytest.raises(ConnectionError) as caught, ray_session(ClusterConfig(address="[::1]:1")):
        pass
    assert "name or service not known" not in str(caught.value)
