"""LoadHistory: what came, window by window, so that a controller that begins knows what one before it has seen. Pure.

Windows of the last hour are kept as they were observed, older ones in slots of five minutes (the forecaster's), for
four weeks. A minute at a time is written to the store's stream by whoever leads; every candidate reads it when it
starts and keeps its own since then. Times are Unix seconds.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from solver.control import Demand

SLOT_S = 300.0
FINE_S = 3600.0
KEPT_S = 28 * 86400.0
WRITTEN_S = 60.0
_COLUMNS = ("requests", "input_tokens", "output_tokens")
MOST_WRITTEN = round(KEPT_S / WRITTEN_S)


class Window(NamedTuple):
    """What came in the time up to ``until_unix_s``."""

    until_unix_s: float
    demand: Demand


class LoadHistory:
    """``add`` what is observed; ``windows`` is all of it, oldest first."""

    def __init__(self) -> None:
        self._coarse: deque[Window] = deque()
        self._fine: deque[Window] = deque()
        self._unwritten: list[Window] = []

    def add(self, until_unix_s: float, demand: Demand) -> None:
        """Take in a window."""
        window = Window(until_unix_s, demand)
        self._fine.append(window)
        self._unwritten.append(window)
        self._age(until_unix_s)

    @property
    def windows(self) -> tuple[Window, ...]:
        """All of it, oldest first."""
        return (*self._coarse, *self._fine)

    def to_write(self, least_s: float = WRITTEN_S) -> list[dict[str, Any]]:
        """What is over and not written, if it is that much time; asking takes it."""
        if not self._unwritten or sum(window.demand.window_s for window in self._unwritten) < least_s:
            return []
        whole = _joined(self._unwritten)
        self._unwritten = []
        return [_document(whole)]

    def read(self, documents: Iterable[Mapping[str, Any]], demands: int) -> None:
        """Take in what others wrote, oldest first; what is not of this many demands is of another configuration.

        Raises ``ValueError`` for what is no window.
        """
        for plain in documents:
            window = _window(plain)
            if len(window.demand.requests) == demands:
                self._fine.append(window)
                self._age(window.until_unix_s)
        self._unwritten.clear()

    def forget_unwritten(self) -> None:
        """Another leads and writes what came."""
        self._unwritten.clear()

    def _age(self, now_unix_s: float) -> None:
        while self._fine and self._fine[0].until_unix_s < now_unix_s - FINE_S:
            window = self._fine.popleft()
            if self._coarse and self._coarse[-1].until_unix_s // SLOT_S == window.until_unix_s // SLOT_S:
                self._coarse[-1] = _joined([self._coarse[-1], window])
            else:
                self._coarse.append(window)
        while self._coarse and self._coarse[0].until_unix_s < now_unix_s - KEPT_S:
            self._coarse.popleft()


def _joined(windows: Sequence[Window]) -> Window:
    demands = [window.demand for window in windows]
    return Window(
        windows[-1].until_unix_s,
        Demand(
            sum(d.window_s for d in demands),
            np.sum([d.requests for d in demands], axis=0),
            np.sum([d.input_tokens for d in demands], axis=0),
            np.sum([d.output_tokens for d in demands], axis=0),
            demands[-1].queued,
        ),
    )


def _document(window: Window) -> dict[str, Any]:
    demand = window.demand
    return {
        "until": window.until_unix_s,
        "window_s": demand.window_s,
        "requests": demand.requests.tolist(),
        "input_tokens": demand.input_tokens.tolist(),
        "output_tokens": demand.output_tokens.tolist(),
    }


def _window(plain: Mapping[str, Any]) -> Window:
    try:
        requests, inputs, outputs = (np.array(plain[name], dtype=np.float64) for name in _COLUMNS)
        demand = Demand(float(plain["window_s"]), requests, inputs, outputs, np.zeros(len(requests)))
        return Window(float(plain["until"]), demand)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no window of past load: {error!r}") from None
