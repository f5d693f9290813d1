"""Lines between the workers of one machine: what is sent arrives, of nobody else, and a line that breaks is noted."""

from __future__ import annotations

import dataclasses
import pickle
import queue
import socket
import time
from typing import Any

import numpy as np
import pytest

from billhook.cluster import lines as module
from billhook.cluster.exchange import Inbox
from billhook.cluster.lines import SECRET_BYTES, Door, Lines, pickled, unpickled


class Listener:
    def __init__(self) -> None:
        self.received: queue.Queue[Any] = queue.Queue()
        self.lost: queue.Queue[str] = queue.Queue()
        self.lines = Lines(self.received.put, self.lost.put)

    @property
    def door(self) -> Door:
        assert self.lines.door is not None
        return self.lines.door


def hung_up(line: socket.socket) -> bool:
    """Wait until the other side is gone."""
    line.settimeout(10)
    try:
        return line.recv(1) == b""
    except ConnectionError:
        return True


def test_parts_arrive_together_and_in_order() -> None:
    one, other = Listener(), Listener()
    one.lines.connect({7: other.door})
    assert one.lines.reach(7)
    assert not one.lines.reach(0)
    array = np.arange(3_000_000, dtype=np.float32).reshape(3, -1)
    one.lines.send(7, pickled({"rank": 1, "array": array, "strided": array[:, ::2], "empty": array[:0]}))
    one.lines.send(7, [b"", b"second"])
    message = unpickled(other.received.get(timeout=10))
    assert message["rank"] == 1
    assert np.array_equal(message["array"], array)
    assert np.array_equal(message["strided"], array[:, ::2])
    assert message["empty"].shape == (0, 1_000_000)
    assert not message["array"].flags.writeable
    assert other.received.get(timeout=10) == [b"", b"second"]


def test_who_does_not_know_the_secret_is_not_listened_to() -> None:
    listener, stranger = Listener(), Listener()
    stranger.lines.connect({0: dataclasses.replace(listener.door, secret=bytes(SECRET_BYTES))})
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"\0{listener.door.name}")
        line.sendall(pickle.dumps("run that, without any secret, but longer than one would be"))
        assert hung_up(line)
    friend = Listener()
    friend.lines.connect({0: listener.door})
    friend.lines.send(0, [b"hello"])
    assert listener.received.get(timeout=10) == [b"hello"]
    assert listener.received.empty()
    assert not stranger.lines.reach(0)
    assert listener.door.secret.hex() not in repr(listener.door)


def test_where_nobody_listens_there_is_no_line() -> None:
    lines = Listener().lines
    lines.connect({0: Door("nobody", bytes(SECRET_BYTES))})
    assert not lines.reach(0)


def test_one_who_does_not_answer_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTRODUCTION_SECONDS", 0.2)
    name = "billhook-test-that-nobody-answers"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"\0{name}")
        silent.listen()
        lines = Listener().lines
        lines.connect({0: Door(name, bytes(SECRET_BYTES))})
        assert not lines.reach(0)


def test_both_ends_hear_of_a_line_that_breaks() -> None:
    one, other = Listener(), Listener()
    one.lines.connect({0: other.door})
    line = one.lines._lines[0]
    line.sendall(bytes(3))  # the begin of something
    line.shutdown(socket.SHUT_RDWR)
    assert "ended" in other.lost.get(timeout=10)
    one.lines.send(0, [b"too late"])
    assert "worker 0" in one.lost.get(timeout=10)


def test_what_may_never_come_is_waited_for_a_last_time() -> None:
    inbox, key = Inbox(), ((0, 1), 1, 1)
    assert inbox.take([key], 0.01) is None
    inbox.lose("the line ended")
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="the line ended"):
        inbox.take([key], 0.2)
    assert time.monotonic() - begin >= 0.2
    inbox.put_parts([bytearray(pickle.dumps(key))])
    (envelope,) = inbox.take([key], 0.0) or []
    assert envelope.empty
