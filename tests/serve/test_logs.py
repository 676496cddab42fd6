"""Lines of the log that repeat."""

import logging

import pytest

from serve.logs import LINES, PERIOD, RateLimit


@pytest.fixture
def written():
    """(a logger, what it has written, a list that holds the time)"""
    lines, now = [], [100.0]

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.Logger("test"), Keep()
    handler.addFilter(RateLimit(lambda: now[0]))
    logger.addHandler(handler)
    return logger, lines, now


def test_a_line_that_repeats_is_written_so_often_in_a_period(written):
    logger, lines, now = written
    for i in range(LINES + 90):
        logger.error("%d: failed", i)
    logger.error("something else")
    assert lines == [*(f"{i}: failed" for i in range(LINES)), "something else"]
    now[0] += PERIOD
    logger.error("%d: failed", 7)
    assert lines[-1] == "7: failed (and 90 more in the last 10 s)"
    logger.error("%d: failed", 8)
    assert lines[-1] == "8: failed"
