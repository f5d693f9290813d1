from __future__ import annotations

import pytest

from billhook.cluster.pool import _check_alike
from billhook.layerworkers.errors import InputError

FACTS = {"flags": "avx2 fma3", "torch": "2.13.0"}


def test_workers_must_be_alike_and_as_the_run_was_begun() -> None:
    names = ["worker 0", "worker 1"]
    _check_alike([FACTS, FACTS], None, names)
    _check_alike([FACTS, FACTS], FACTS, names)
    with pytest.raises(InputError, match=r"worker 1 has torch '2\.12\.0', not '2\.13\.0' as worker 0"):
        _check_alike([FACTS, {**FACTS, "torch": "2.12.0"}], None, names)
    with pytest.raises(InputError, match=r"worker 0 has flags 'avx2 fma3', not 'avx512' as this command"):
        _check_alike([FACTS], {**FACTS, "flags": "avx512"}, names[:1])
