"""A Redis or Valkey server of one's own, on a free port, with nothing on disk; killed and started at will."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")
MISSING = "neither redis-server nor valkey-server is installed (Debian: apt install redis-server)"
START_TRIES = 200


class RedisServer:
    """It runs from the start; ``stop`` it."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        if BINARY is None:
            raise FileNotFoundError(MISSING)
        options = {"--bind": "127.0.0.1", "--port": str(self.port), "--dir": str(self._folder), "--save": ""}
        words = [word for option in options.items() for word in option]
        self._process = subprocess.Popen([BINARY, *words], stdout=subprocess.DEVNULL)
        for _ in range(START_TRIES):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{BINARY} does not listen on {self.port}")

    def kill(self) -> None:
        """End it as kill -9 does: everything it knew is lost."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End it."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=10)
            self._process = None


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
