"""The one place of the front door that reads a clock."""

import time

monotonic_s = time.monotonic
"""Seconds that never go back; the start is arbitrary. The function itself: every request reads it several times."""


def unix_offset_s() -> float:
    """What turns ``monotonic_s`` into Unix seconds."""
    return time.time() - time.monotonic()
