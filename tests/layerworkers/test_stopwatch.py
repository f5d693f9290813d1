import pytest

from billhook.layerworkers import stopwatch
from billhook.layerworkers.stopwatch import PARTS, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def fail(watch: Stopwatch, clock: Clock) -> None:
    with watch.part("factors"):
        clock.now += 8
        raise ZeroDivisionError


def test_every_moment_belongs_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    watch = Stopwatch()
    clock.now += 1
    with watch.part("solving"):
        clock.now += 2
        with watch.part("moving"):
            clock.now += 4
        with pytest.raises(ZeroDivisionError):
            fail(watch, clock)
        clock.now += 16
    clock.now += 32
    assert watch.read() == dict.fromkeys(PARTS, 0.0) | {"forward": 33.0, "solving": 18.0, "moving": 4.0, "factors": 8.0}
    clock.now += 64
    assert watch.read() == dict.fromkeys(PARTS, 0.0) | {"forward": 64.0}
