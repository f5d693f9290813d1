"""Direct lines between the workers of one machine: a small message takes a tenth of a call through Ray.

A worker listens under a name that exists in memory only (Linux's abstract sockets), so nothing is left of it on a disk.
Whoever connects must be of the same user, and first send a secret, which the worker has told the others through Ray,
whose calls are under its token; nothing else that it sends is looked at before.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import pickle
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SECRET_BYTES = 32

WELCOME = b"."
"""What one who has sent the secret is answered."""

INTRODUCTION_SECONDS = 10.0
"""How long either side waits for the secret, or the answer."""

Parts = Sequence[bytes | bytearray | memoryview]
"""What is sent together: whatever has bytes."""

_LENGTH = struct.Struct("!Q")
_CREDENTIALS = struct.Struct("iII")  # process, user, group


@dataclass(frozen=True)
class Door:
    """Where a worker can be reached from its own machine."""

    name: str
    secret: bytes = field(repr=False)


class Lines:
    """A worker's door, and its lines to others: what it sends, and a thread for each that sends to it."""

    def __init__(self, receive: Callable[[list[bytearray]], None], lose: Callable[[str], None]):
        """receive: called, in another thread, with the parts that somebody sent together.

        lose: called, perhaps in another thread, with the reason when a line broke: something may not have arrived.
        """
        self._receive, self._lose = receive, lose
        self._lines: dict[int, socket.socket] = {}
        self.door: Door | None = None
        """None where the system has no such sockets."""
        if sys.platform == "linux":
            door = Door(f"billhook-{secrets.token_hex(16)}", secrets.token_bytes(SECRET_BYTES))
            listener = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                listener.bind(f"\0{door.name}")
                listener.listen()
                threading.Thread(target=self._admit, args=(listener, door.secret), name="door", daemon=True).start()
                self.door = door

    def connect(self, doors: Mapping[int, Door]) -> None:
        """Open a line to each of ``doors`` where somebody answers; the others are done without."""
        for rank, door in doors.items():
            line = socket.socket(socket.AF_UNIX)
            try:
                line.settimeout(INTRODUCTION_SECONDS)
                line.connect(f"\0{door.name}")
                line.sendall(door.secret)
                _exactly(line, len(WELCOME))
                line.settimeout(None)
                self._lines[rank] = line
            except OSError:  # another network namespace, or nobody listens any more
                line.close()

    def reach(self, rank: int) -> bool:
        """Whether there is a line to this worker."""
        return rank in self._lines

    def send(self, rank: int, parts: Parts) -> None:
        """Send parts together; ``lose`` hears of it when they cannot be."""
        views = [memoryview(part).cast("B") for part in parts]
        sizes = [_LENGTH.pack(size) for size in (len(views), *(view.nbytes for view in views))]
        try:
            self._lines[rank].sendall(b"".join(sizes))
            for view in views:
                self._lines[rank].sendall(view)
        except OSError as error:
            self._lose(f"the line to worker {rank}: {error}")

    def _admit(self, listener: socket.socket, secret: bytes) -> None:
        while True:
            line, _ = listener.accept()
            try:
                if _user_of(line) == os.getuid():
                    threading.Thread(target=self._listen, args=(line, secret), name="line", daemon=True).start()
                    continue
            except (OSError, RuntimeError):  # no room for another thread: the other side does without
                pass
            line.close()

    def _listen(self, line: socket.socket, secret: bytes) -> None:
        with line:
            line.settimeout(INTRODUCTION_SECONDS)
            with contextlib.suppress(OSError):
                if not hmac.compare_digest(_exactly(line, SECRET_BYTES), secret):
                    return
                line.settimeout(None)
                line.sendall(WELCOME)
                try:
                    while True:
                        (count,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
                        sizes = _exactly(line, count * _LENGTH.size)
                        self._receive([_exactly(line, size) for (size,) in _LENGTH.iter_unpack(sizes)])
                except Exception as error:
                    self._lose(f"a line from another worker: {error}")


def _user_of(line: socket.socket) -> int:
    """Return the id of the user whose process is at the other end."""
    _, user, _ = _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


def _exactly(line: socket.socket, size_bytes: int) -> bytearray:
    """Return the next bytes.

    Raises:
        ConnectionError: when the line ends before.
    """
    data = bytearray(size_bytes)
    view = memoryview(data)
    while view:
        received = line.recv_into(view)
        if not received:
            raise ConnectionError("it ended")
        view = view[received:]
    return data


def pickled(message: Any) -> list[bytes | memoryview]:
    """Return a message as parts: the arrays in it by themselves, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    return [body, *(buffer.raw() for buffer in buffers)]


def unpickled(parts: Sequence[bytearray]) -> Any:
    """Return the message; its arrays are read-only."""
    body, *buffers = parts
    return pickle.loads(body, buffers=[memoryview(each).toreadonly() for each in buffers])
