"""`python -m tests.sweep.faked …`: sweep.py over faked servers."""

import sys

from sweep.main import main

if __name__ == "__main__":
    main((sys.executable, "-m", "tests.sweep.fake_server"))
