"""SiteMetrics: one /metrics for processes that share a port, each sample labelled with the process it comes from.

A scrape reaches any of them; so each tells the others its page now and then, and answers with all: its own as it is
now, theirs as they last said. A silent process' page lapses.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from dynamollm.store import Store

log = logging.getLogger("dynamollm.metrics")

TELL_S = 2.0
TTL_S = 10.0


class SiteMetrics:
    """``run`` it as a task; ``parts`` is what to answer a scrape with."""

    def __init__(self, store: Store, site: str, name: str, own: Callable[[], Iterable[bytes]]) -> None:
        """``site``: what the processes share; ``own``: this one's page, in parts that each are made quickly."""
        self._store = store
        self._group = f"metrics:{site}"
        self._name = name
        self._own = own
        self._others: dict[str, str] = {}

    def parts(self) -> Iterator[bytes]:
        """Everybody's samples; all at the end, but there are things to do while this process' own are collected."""
        own = []
        for part in self._own():
            own.append(part)
            yield b""
        yield merged({**self._others, self._name: b"".join(own).decode()}).encode()

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        while True:
            own = []
            for part in self._own():
                own.append(part)
                await asyncio.sleep(0)
            try:
                await self._store.report(self._group, self._name, {"page": b"".join(own).decode()}, TTL_S)
                told = await self._store.reports(self._group)
            except OSError as error:
                log.debug("pages of other processes stay as they were: %s", error)
            else:
                self._others = {name: str(each["page"]) for name, each in told.items() if name != self._name}
            await asyncio.sleep(TELL_S)


def merged(pages: Mapping[str, str]) -> str:
    """Pages in Prometheus' text format as one: families together, each sample with its process as ``replica``."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for name, page in sorted(pages.items()):
        label = 'replica="{}"'.format(name.replace("\\", r"\\").replace('"', r"\""))
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                known = heads.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, label))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return "\n".join(lines) + "\n"


def _labelled(sample: str, label: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
