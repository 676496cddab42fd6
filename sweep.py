"""Measure configurations and decide between them: Hydra's multirun starts the real server for each and loads it.

    python sweep.py -m buckets=latency,balanced tp=1,2 sweep.concurrency=1,4,16,64
    python sweep.py -m +sweep=quick

Each job returns its objective, so any Hydra sweeper can search. What `sweep.*` means: sweep/settings.py.
"""

import sys

from sweep.main import main

if __name__ == "__main__":
    main((sys.executable, "serve.py"))
