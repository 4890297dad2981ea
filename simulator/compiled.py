"""Compile a function and all it calls of our own packages with Numba, without those functions knowing.

The hot loop of virtual time uses the product's own scheduling, routing and profile functions. They are plain Python and
stay so: ``compile_trees`` rebuilds each with the compiled versions of its callees in place of its globals.

Compiled code is cached on disk by the text of every function in the tree: Numba's own check looks at the one file that
defines a function and would miss a change in a callee.
"""

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numba
from numba.core import config

OURS = ("simulator", "solver", "pools", "energy", "tests", "test_")

# Nothing in the loop allocates, so reference counting is switched off: with it, handing the named tuples of arrays from
# function to function costs seventeen times the work itself. IEEE division, as NumPy does it.
OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "_nrt": False}


def compile_trees(*functions: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The same functions, compiled with everything of ours they call; what they share is compiled once."""
    tree: dict[str, FunctionType] = {}
    for function in functions:
        _collect(cast(FunctionType, function), tree)
    # set by name: numba makes the attributes of its configuration while it reads the environment
    setattr(config, "CACHE_DIR", str(_cache_root() / _digest(tree)))  # noqa: B010
    done: dict[FunctionType, Any] = {}
    return tuple(_compile(cast(FunctionType, function), done) for function in functions)


def _callees(function: FunctionType) -> dict[str, FunctionType]:
    """Global names of a function that are plain functions of our packages."""
    found = {}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType) and value.__module__.startswith(OURS):
            found[name] = value
    return found


def _collect(function: FunctionType, tree: dict[str, FunctionType]) -> dict[str, FunctionType]:
    key = f"{function.__module__}.{function.__qualname__}"
    if key not in tree:
        tree[key] = function
        for callee in _callees(function).values():
            _collect(callee, tree)
    return tree


def _digest(tree: dict[str, FunctionType]) -> str:
    """Of the whole source files: constants and named tuples of a module are compiled in as well."""
    files = {inspect.getfile(function) for function in tree.values()}
    text = hashlib.sha256(numba.__version__.encode())
    for file in sorted(files):
        text.update(Path(file).read_bytes())
    return text.hexdigest()[:16]


def _cache_root() -> Path:
    configured = os.environ.get("DYNAMOLLM_CACHE")
    if configured:
        return Path(configured)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = Path(home) / "dynamollm"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: compile anew for each boot rather than fail
        return Path(tempfile.gettempdir()) / "dynamollm"
    return root


def _compile(function: FunctionType, done: dict[FunctionType, Any]) -> Any:
    if function not in done:
        names = dict(function.__globals__)
        for name, callee in _callees(function).items():
            names[name] = _compile(callee, done)
        rebuilt = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        rebuilt.__kwdefaults__ = function.__kwdefaults__
        rebuilt.__qualname__ = function.__qualname__
        rebuilt.__module__ = function.__module__
        done[function] = numba.njit(**OPTIONS)(rebuilt)
    return done[function]
