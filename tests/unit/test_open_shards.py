"""Shards are opened once, ahead of their use, and by whoever needs them first; errors come to who asks."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.open_shards import NUM_THREADS, OpenShards
from pipeline.shards import ShardReader, ShardSample, ShardWriter
from pipeline.storage import ArtifactError


class Shelf:
    """Opens shards that are named by their number, and notes when."""

    def __init__(self, path: Path) -> None:
        with ShardWriter(path, codebook_size=16) as writer:
            writer.add(ShardSample(key="0", codes_VT=np.zeros((1, 4), dtype=np.uint16), metadata={}))
            self._index = writer.close().index
        self._data = path.read_bytes()
        self.opened: list[int] = []
        self.may_open = threading.Event()
        self.may_open.set()
        self.broken: set[int] = set()

    def open(self, shard: int) -> ShardReader:
        self.opened.append(shard)
        assert self.may_open.wait(10)
        if shard in self.broken:
            raise ArtifactError(f"open shard {shard}: broken")
        return ShardReader(self._data, index=self._index, where=str(shard))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "0.tar")


def wait_until_opened(shelf: Shelf, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(shelf.opened) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def test_an_open_shard_is_not_opened_again(shelf: Shelf) -> None:
    shards = OpenShards(shelf.open, max_open=2)
    assert [shards.reader(number).where for number in (1, 2, 1, 2)] == ["1", "2", "1", "2"]
    assert shelf.opened == [1, 2]


def test_the_least_recently_used_is_closed(shelf: Shelf) -> None:
    shards = OpenShards(shelf.open, max_open=2)
    for number in (1, 2, 1, 3, 1, 2):
        shards.reader(number)
    assert shelf.opened == [1, 2, 3, 2]


def test_expected_shards_are_open_when_they_are_asked_for(shelf: Shelf) -> None:
    shards = OpenShards(shelf.open, max_open=20)
    shards.expect(range(10))
    wait_until_opened(shelf, 10)
    assert sorted(shelf.opened) == list(range(10))
    assert [shards.reader(number).where for number in range(10)] == [str(number) for number in range(10)]
    assert len(shelf.opened) == 10
    shards.close()


def test_a_shard_that_waits_its_turn_is_opened_by_who_needs_it(shelf: Shelf) -> None:
    shelf.may_open.clear()
    shards = OpenShards(shelf.open, max_open=100)
    shards.expect(range(50))
    wait_until_opened(shelf, NUM_THREADS)
    needed = threading.Thread(target=shards.reader, args=(49,))
    needed.start()
    wait_until_opened(shelf, NUM_THREADS + 1)
    assert shelf.opened[-1] == 49
    shelf.may_open.set()
    needed.join()
    shards.close()


def test_shards_that_are_no_longer_expected_are_not_opened(shelf: Shelf) -> None:
    shelf.may_open.clear()
    shards = OpenShards(shelf.open, max_open=NUM_THREADS)
    shards.expect(range(NUM_THREADS))
    wait_until_opened(shelf, NUM_THREADS)
    shards.expect(range(100, 150))  # only the last ones of them have room
    shelf.may_open.set()
    wait_until_opened(shelf, 2 * NUM_THREADS)
    shards.close()
    assert set(shelf.opened) <= set(range(NUM_THREADS)) | set(range(150 - NUM_THREADS, 150))


def test_an_error_comes_to_who_asks_and_asking_again_tries_again(shelf: Shelf) -> None:
    shelf.broken = {3}
    shards = OpenShards(shelf.open, max_open=20)
    shards.expect(range(5))
    wait_until_opened(shelf, 5)
    assert shards.reader(4).where == "4"
    with pytest.raises(ArtifactError, match="open shard 3: broken"):
        shards.reader(3)
    shelf.broken = set()
    assert shards.reader(3).where == "3"
    shards.close()


def test_closing_ends_the_threads_and_may_be_followed_by_reading(shelf: Shelf) -> None:
    before = threading.active_count()
    shards = OpenShards(shelf.open, max_open=20)
    shards.expect(range(5))
    assert threading.active_count() == before + NUM_THREADS
    shards.close()
    assert threading.active_count() == before
    assert shards.reader(2).where == "2"
    shards.expect([2, 3])
    shards.close()
    assert threading.active_count() == before


def test_closing_waits_for_no_shard_that_opens_slowly(shelf: Shelf) -> None:
    shelf.may_open.clear()
    shards = OpenShards(shelf.open, max_open=20)
    shards.expect(range(5))
    wait_until_opened(shelf, NUM_THREADS)
    began = time.monotonic()
    shards.close()
    assert time.monotonic() - began < 2
    shelf.may_open.set()
    assert shards.reader(2).where == "2"
    shards.close()
