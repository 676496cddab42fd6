"""Imported before any test, and before torch: what a rank's environment has (see serve.py)."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
