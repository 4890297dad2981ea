"""Stub machines for the tests of this folder."""

import ctypes
from pathlib import Path

import pytest
from nvml_stub import StubMachine, build, missing_compiler


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing_compiler():
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(stub_library: Path, tmp_path: Path) -> StubMachine:
    """Four GPUs; children find them through ``machine.environment``."""
    return StubMachine(tmp_path, stub_library)


@pytest.fixture
def here(machine: StubMachine, monkeypatch: pytest.MonkeyPatch) -> StubMachine:
    """The same, found by this process too: the dynamic loader takes what is loaded under the library's name."""
    ctypes.CDLL(str(machine.library), mode=ctypes.RTLD_GLOBAL)
    monkeypatch.setenv("NVML_STUB_STATE", str(machine.path))
    return machine
