"""Rank 0's steps reach the other ranks whole and in order, and rank 0 waits for the slowest."""

import resource
from dataclasses import dataclass
from threading import Thread

import numpy as np
import pytest

from conf.schema import ConfigError
from engine.channel import StepChannel

WORDS = 16


@dataclass
class Place:
    """A rank in the test's own process: all of them meet in one thread, so there is nothing to wait for."""

    rank: int
    size: int

    def smallest(self, number):
        return number


@pytest.fixture
def channels(tmp_path):
    return [StepChannel(Place(rank, 3), WORDS, tmp_path) for rank in range(3)]


def step(number):
    return np.arange(number, number + 1 + number % WORDS, dtype=np.int32)


def received(channel):
    words = np.full(WORDS, -1, np.int32)
    bucket = channel.receive(words)
    return bucket, words[: np.argmax(np.append(words, -1) == -1)].tolist()


def test_a_folder_without_room_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(ConfigError, match=rf"^TMPDIR: cannot write \d+ bytes in {tmp_path}/steps: File too large$"):
            StepChannel(Place(0, 2), 100_000, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_rank_gets_every_step_whole_and_in_order(channels):
    leader, *others = channels
    for number in range(3 * StepChannel.DEPTH):
        leader.send(number % 5, step(number))
        for other in others:
            assert received(other) == (number % 5, step(number).tolist())


def test_a_step_leaves_the_rest_of_the_readers_words_alone(channels):
    channels[0].send(1, np.array([7, 8], np.int32))
    words = np.full(WORDS, -1, np.int32)
    channels[1].receive(words)
    assert words.tolist() == [7, 8] + [-1] * (WORDS - 2)


def test_the_leader_waits_for_the_slowest_rank_and_overwrites_nothing(channels):
    leader, quick, slow = channels
    for number in range(StepChannel.DEPTH):
        leader.send(number, step(number))
    for number in range(StepChannel.DEPTH):
        assert received(quick) == (number, step(number).tolist())
    sender = Thread(target=leader.send, args=(9, step(9)), daemon=True)
    sender.start()
    sender.join(0.3)
    assert sender.is_alive()
    assert received(slow) == (0, step(0).tolist())
    sender.join(30)
    assert not sender.is_alive()
    for number in range(1, StepChannel.DEPTH):
        assert received(slow) == (number, step(number).tolist())
    assert received(slow) == received(quick) == (9, step(9).tolist())


def test_a_rank_waits_until_there_is_a_step(channels):
    results = []
    reader = Thread(target=lambda: results.append(received(channels[1])), daemon=True)
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    channels[0].send(2, step(3))
    reader.join(30)
    assert results == [(2, step(3).tolist())]
