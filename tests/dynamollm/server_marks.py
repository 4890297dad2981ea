"""Marks of tests that need an installed server."""

import pytest

from benchmarks.adapters.redis_server import BINARY, MISSING

needs_redis = pytest.mark.skipif(BINARY is None, reason=MISSING)
