"""Keeps standard output for what we print: compiled libraries, HiGHS among them, write to descriptor 1 themselves."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def libraries_to_stderr() -> Iterator[None]:
    """Inside, what C code writes to standard output goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
