"""The faked engine behind a real server, as in tests/serve."""

from tests.serve.conftest import serve, workers

__all__ = ["serve", "workers"]
