"""A library that writes to descriptor 1 does not get between our lines."""

import subprocess
import sys

SCRIPT = """
import os
from dynamollm.adapters.own_stdout import libraries_to_stderr
print("before")
with libraries_to_stderr():
    os.write(1, b"library\\n")
print("after")
"""


def test_what_a_library_writes_goes_to_standard_error():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "before\nafter\n"
    assert done.stderr == "library\n"
