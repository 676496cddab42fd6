"""Processes that never outlive their parent: `Child`, and any that is started with `dying_with_parent`.

Knows how the kernel ends a process, and by name where a rank begins. Imports nothing slow: a child asks to die with its
parent before it does anything else.
"""

import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import Config

PR_SET_PDEATHSIG = 1  # of prctl(2)
# A signal that a terminal or a service manager sends to all processes of a server: its parent decides when to stop.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# The child's first words; its modules are found where the parent finds them.
_CHILD = "import sys; sys.path[:] = {path!r}; from engine.lifetime import run; run({parent}, {function!r})"


def dying_with_parent() -> Callable[[], None]:
    """A function for a new child of this process, which makes the kernel kill the child when this process ends.

    A child whose parent is gone by then ends at once. To be called here, before the child is forked: it may then run
    between fork and exec. The kernel counts the thread that forks as the parent.
    """
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask() -> None:
        die_with(parent, prctl)

    return ask


def die_with(parent: int, prctl: Callable[[int, int], object]) -> None:
    """Make the kernel kill this process when `parent` ends, which started it; `prctl` is libc's. At once if it has."""
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


class Child:
    """A function in a Python process of its own, which never outlives this one."""

    def __init__(self, name: str, function: str, *arguments: object, files: Sequence[int] = ()) -> None:
        """Starts `function`, as `module:function`, with picklable arguments. The process inherits the descriptors
        `files`. The thread that calls this must live as long as the process shall.
        """
        self.name = name
        code = _CHILD.format(path=[path or os.getcwd() for path in sys.path], parent=os.getpid(), function=function)
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=files)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:  # it has ended already, which `ending` tells
            pickle.dump(arguments, stdin)
        self.exited = os.pidfd_open(self._process.pid)  # a file that is readable once the process has ended

    @property
    def ending(self) -> str | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{self.name} ended with {how}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it, and wait until it has ended. A second time does nothing."""
        self._process.kill()
        self._process.wait()
        exited, self.exited = self.exited, -1  # two threads may come here
        if exited >= 0:
            os.close(exited)


def rank_process(config: "Config", rank: int, run_folder: str) -> Child:
    """Starts a rank. By name, since its module imports torch."""
    return Child(f"rank {rank}", "engine.rank:run_rank", config, rank, run_folder)


def run(parent: int, function: str) -> None:
    """What a Child's process runs; `parent` is the process that started it."""
    die_with(parent, ctypes.CDLL(None).prctl)
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    arguments = pickle.load(sys.stdin.buffer)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)  # here: the module may be slow to import
