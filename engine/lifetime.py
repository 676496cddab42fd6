"""Processes that never outlive their parent: those of ranks, and any that is started with `dying_with_parent`.

Knows how the kernel ends a process; nothing of engines. Imports nothing slow: a rank's process asks to die with its
parent before it does anything else.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import Config

PR_SET_PDEATHSIG = 1  # of prctl(2)
# A signal that a terminal or a service manager sends to all processes of a server: its parent decides when to stop.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# The child's first words; its modules are found where the parent finds them.
_CHILD = "import sys; sys.path[:] = {path!r}; from engine.lifetime import run_child; run_child({parent})"


def dying_with_parent() -> Callable[[], None]:
    """A function for a new child of this process, which makes the kernel kill the child when this process ends.

    A child whose parent is gone by then ends at once. To be called here, before the child is forked: it may then run
    between fork and exec. The kernel counts the thread that forks as the parent.
    """
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask() -> None:
        _die_with(parent, prctl)

    return ask


def _die_with(parent: int, prctl: Callable[[int, int], object]) -> None:
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


class RankProcess:
    """`engine.rank.run_rank(config, rank, run_folder)` in a process of its own, which never outlives this one."""

    def __init__(self, config: "Config", rank: int, run_folder: str) -> None:
        """Starts it. The thread that does must live as long as the rank shall."""
        self.name = f"rank {rank}"
        code = _CHILD.format(path=[path or os.getcwd() for path in sys.path], parent=os.getpid())
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:  # it has ended already, which `ending` tells
            pickle.dump((config, rank, run_folder), stdin)
        self.exited = os.pidfd_open(self._process.pid)  # a file that is readable once the process has ended

    @property
    def ending(self) -> str | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{self.name} ended with {how}"

    def kill(self) -> None:
        """End it, and wait until it has ended. A second time does nothing."""
        self._process.kill()
        self._process.wait()
        if self.exited >= 0:
            os.close(self.exited)
            self.exited = -1


def run_child(parent: int) -> None:
    """What a RankProcess runs; `parent` is the process that started it."""
    _die_with(parent, ctypes.CDLL(None).prctl)
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    config, rank, run_folder = pickle.load(sys.stdin.buffer)
    from engine.rank import run_rank  # here: it imports torch, and is slow

    run_rank(config, rank, run_folder)
