"""The one place of the front door that reads a clock."""

import time


def monotonic_s() -> float:
    """Seconds that never go back; the start is arbitrary."""
    return time.monotonic()


def unix_offset_s() -> float:
    """What turns ``monotonic_s`` into Unix seconds."""
    return time.time() - time.monotonic()
