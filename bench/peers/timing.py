"""How long a peer's call takes; it runs in the peers' environments, so it needs nothing but Python."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call, after one for warming up; the mean over 0.2 seconds."""
    call()
    start, repetitions = time.process_time(), 0
    while time.process_time() - start < 0.2:
        call()
        repetitions += 1
    return (time.process_time() - start) / repetitions
