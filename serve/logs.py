"""The log's rate: what one client can cause again and again must not fill a disk. Knows logging alone."""

import logging
import time
from collections.abc import Callable, Hashable

LINES = 10  # of one kind, in each period
PERIOD = 10.0  # seconds


class RateLimit(logging.Filter):
    """A handler's filter: of lines with one origin and one format, it passes so many in a period, and counts the rest.

    The first line of the next period says how many were left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._periods: dict[Hashable, tuple[float, int]] = {}  # by kind: when its period began, and its lines since

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, record.levelno, record.msg)
        now = self._clock()
        began, lines = self._periods.get(kind, (now, 0))
        if now - began >= PERIOD:
            if lines > LINES:
                record.msg = f"{record.msg} (and {lines - LINES} more in the last {now - began:.0f} s)"
            began, lines = now, 0
        self._periods[kind] = (began, lines + 1)
        return lines < LINES
