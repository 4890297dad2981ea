"""What the gateway's process does without: who imports the solver pays for it in memory, in every gateway."""

import subprocess
import sys

HEAVY = ("llvmlite", "matplotlib", "numba", "scipy")


def test_serving_imports_neither_solver_nor_compiler():
    script = "import sys, dynamollm.commands.serve; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
