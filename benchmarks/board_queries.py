"""BoardQuery: what a Grafana board asks Prometheus, panel by panel, with Grafana's own variables put in. Pure.

``answered`` judges an answer as a person before the board would: a panel shows something if a finite number is in it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LABEL_VALUES = re.compile(r"label_values\((.+),\s*(\w+)\)$")


@dataclass(frozen=True, slots=True)
class BoardQuery:
    """One target of one panel; ``instant`` or over the board's time."""

    panel: str
    ref: str
    expr: str
    instant: bool


def board_queries(board: Mapping[str, Any], scrape_s: int) -> list[BoardQuery]:
    """Every query of the board: panels, variables, annotations. ``scrape_s``: Prometheus' scrape interval."""
    values = {"__rate_interval": f"{4 * scrape_s}s", "__interval": f"{scrape_s}s", "__range": "5m"}
    values |= {each["name"]: each["allValue"] for each in board["templating"]["list"]}
    return [BoardQuery(query.panel, query.ref, _filled(query.expr, values), query.instant) for query in _queries(board)]


def _queries(board: Mapping[str, Any]) -> Iterator[BoardQuery]:
    for variable in board["templating"]["list"]:
        found = _LABEL_VALUES.match(variable["query"])
        if found is None:
            raise ValueError(f"variable {variable['name']}: only label_values(...) is known, not {variable['query']!r}")
        yield BoardQuery(f"variable {variable['name']}", "", f"count by ({found[2]}) ({found[1]})", True)
    for annotation in board["annotations"]["list"]:
        yield BoardQuery(f"annotation {annotation['name']}", "", annotation["expr"].split(" > ")[0], False)
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield BoardQuery(panel["title"], target["refId"], target["expr"], target.get("instant", False))


def _filled(expr: str, values: Mapping[str, str]) -> str:
    for name, value in sorted(values.items(), key=lambda item: -len(item[0])):
        expr = expr.replace(f"${name}", value)
    if "$" in expr:
        raise ValueError(f"{expr}: a variable that the board does not define")
    return expr


@dataclass(frozen=True, slots=True)
class Answered:
    """What a query returned: series, and the last finite value of the first that has one."""

    query: BoardQuery
    series: int
    value: float | None

    @property
    def shows(self) -> bool:
        """Whether there is anything to see."""
        return self.value is not None


def answered(query: BoardQuery, result: list[Mapping[str, Any]]) -> Answered:
    """Read ``data.result`` of Prometheus' answer, a vector or a matrix."""
    last = [value for series in result if (value := _last_finite(series)) is not None]
    return Answered(query, len(result), last[0] if last else None)


def _last_finite(series: Mapping[str, Any]) -> float | None:
    samples = series["values"] if "values" in series else [series["value"]]
    finite = [float(text) for _, text in samples if math.isfinite(float(text))]
    return finite[-1] if finite else None
