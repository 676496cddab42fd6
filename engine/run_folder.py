"""The folder where the sockets and shared files of one engine stand, removed at the latest by the next that starts.

Knows files and locks, nothing of what stands in it.
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from conf.schema import ConfigError

PREFIX = "mini-vllm-"
MOST_SOCKET_PATH = 107  # bytes that Linux takes
YOUNG_SECONDS = 2  # a folder younger than this may be about to be locked


class RunFolder:
    """A folder for sockets that only its user can enter; the lock on it is free again when its owner has ended.

    `path` is its path. Making one removes those of dead owners, which were killed before they could.
    """

    def __init__(self) -> None:
        """Raises ConfigError where the folder for temporary files cannot hold it."""
        parent, room = tempfile.gettempdir(), MOST_SOCKET_PATH - len(f"/{PREFIX}01234567/requests")
        if len(os.fsencode(parent)) > room:
            raise ConfigError(f"TMPDIR: got {parent}, allowed: at most {room} bytes: sockets go there")
        for folder in Path(parent).glob(f"{PREFIX}*"):
            _remove_if_stale(folder)
        try:
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)  # mode 0700
            self.path = self._folder.name
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"TMPDIR: cannot make a folder in {parent}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove it with all that it holds. A second time does nothing."""
        if self._lock >= 0:
            self._folder.cleanup()
            os.close(self._lock)
            self._lock = -1


def _remove_if_stale(folder: Path) -> None:
    """Remove a run folder of ours that nobody has locked."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # somebody else's, or gone
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(lock)
        # Another server's is locked a moment after it is made.
        if found.st_uid == os.getuid() and time.time() - found.st_mtime > YOUNG_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its owner lives
    finally:
        os.close(lock)
