"""Turn plain data (parsed YAML) into a frozen dataclass tree, or say where it is wrong and how to put it right.

pydantic checks types and ranges; this module words what it finds: the path of the key, what was found there and,
where a name or a unit is close to one that exists, what was probably meant. It reads no file and no environment.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dynamollm.errors import UserError
from dynamollm.names import closest

T = TypeVar("T")

# unit suffix of a key -> (quantity, factor to that quantity's base unit)
UNITS: dict[str, tuple[str, float]] = {
    "ns": ("time", 1e-9),
    "us": ("time", 1e-6),
    "ms": ("time", 1e-3),
    "s": ("time", 1.0),
    "seconds": ("time", 1.0),
    "min": ("time", 60.0),
    "minutes": ("time", 60.0),
    "h": ("time", 3600.0),
    "hours": ("time", 3600.0),
    "mhz": ("frequency", 1e6),
    "ghz": ("frequency", 1e9),
    "w": ("power", 1.0),
    "kw": ("power", 1e3),
    "j": ("energy", 1.0),
    "kj": ("energy", 1e3),
    "wh": ("energy", 3.6e3),
    "kwh": ("energy", 3.6e6),
    "bytes": ("size", 1.0),
    "kib": ("size", 2.0**10),
    "mib": ("size", 2.0**20),
    "gib": ("size", 2.0**30),
}
_QUANTITY = re.compile(r"^\s*([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*([a-zA-Z]+)\s*$")


class ConfigurationError(UserError):
    """The configuration cannot be used; one line a problem, each with the path of its key."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        """``source`` names the file; ``problems`` are complete sentences."""
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{source}: {len(problems)} problem(s)", *(f"  {line}" for line in problems)]))


def build(tree: type[T], plain: Mapping[str, Any], source: str) -> T:
    """Validate ``plain`` against the dataclass ``tree``. Raises ``ConfigurationError`` naming every problem."""
    adapter = TypeAdapter(tree)
    try:
        # JSON mode is strict about scalars yet takes lists for tuples and objects for dataclasses
        return adapter.validate_json(json.dumps(plain, default=str))
    except ValidationError as error:
        problems = [_describe(tree, entry["type"], entry["loc"], entry) for entry in error.errors()]
        raise ConfigurationError(source, list(dict.fromkeys(problems))) from None


def path_of(location: Sequence[int | str]) -> str:
    """Write a location as a person writes it: ``pools[2].tp``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or "(top level)"


def field_names(tree: Any, location: Sequence[int | str]) -> tuple[str, ...]:
    """Keys that exist at ``location`` of a dataclass tree; empty where there is no dataclass."""
    found = list(_dataclasses_at(tree, location))
    return tuple(field.name for kind in found for field in dataclasses.fields(kind))


def convert_unit(key: str, value: Any, known: Sequence[str]) -> tuple[str, float] | None:
    """Find a known key of the same stem in another unit; return it with the value converted, as ``ttft_s, 0.25``."""
    stem, _, unit = key.rpartition("_")
    if unit not in UNITS or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    quantity, factor = UNITS[unit]
    for candidate in known:
        other_stem, _, other_unit = candidate.rpartition("_")
        if other_stem == stem and other_unit in UNITS and UNITS[other_unit][0] == quantity:
            return candidate, value * factor / UNITS[other_unit][1]
    return None


def _describe(tree: Any, kind: str, location: tuple[int | str, ...], entry: Mapping[str, Any]) -> str:
    path, value = path_of(location), entry["input"]
    if kind == "unexpected_keyword_argument":
        return _unknown_key(tree, location, value)
    if kind in ("missing", "missing_argument"):
        return f"{path}: is required and not given"
    message = str(entry["msg"])
    sentence = f"{path}: {message[0].lower()}{message[1:]}; found {_shown(value)}"
    hint = _unit_hint(str(location[-1]), value) if location else None
    return f"{sentence}; {hint}" if hint else sentence


def _unknown_key(tree: Any, location: tuple[int | str, ...], value: Any) -> str:
    key, known = str(location[-1]), field_names(tree, location[:-1])
    sentence = f"{path_of(location)}: unknown key"
    converted = convert_unit(key, value, known)
    if converted:
        return f"{sentence}; did you mean {converted[0]}: {converted[1]:g}?"
    near = closest(key, known)
    if near:
        return f"{sentence}; did you mean {near}?"
    return f"{sentence}; known here: {', '.join(known)}"


def _unit_hint(key: str, value: Any) -> str | None:
    """Explain a value written with its unit (``250ms``), or one that fits the key only in another unit."""
    unit = key.rpartition("_")[2]
    if unit not in UNITS:
        return None
    quantity, factor = UNITS[unit]
    if isinstance(value, str) and (match := _QUANTITY.match(value)):
        given = UNITS.get(match[2].lower())
        if given and given[0] == quantity:
            return f"the key's unit is {unit}: write {float(match[1]) * given[1] / factor:g}"
        return f"the key's unit is {unit}: write a plain number"
    if isinstance(value, int | float) and quantity == "time" and unit == "s" and value > 0:
        return f"the key's unit is seconds: did you mean {value / 1000:g}?"
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dataclasses_at(tree: Any, location: Sequence[int | str]) -> Iterator[Any]:
    """Walk annotations down a location; a union yields each of its members."""
    if dataclasses.is_dataclass(tree) and isinstance(tree, type):
        if not location:
            yield tree
            return
        hints = typing.get_type_hints(tree)
        head = location[0]
        if isinstance(head, str) and head in hints:
            yield from _dataclasses_at(hints[head], location[1:])
        return
    origin, arguments = typing.get_origin(tree), typing.get_args(tree)
    if origin in (typing.Union, types.UnionType):
        for member in arguments:
            yield from _dataclasses_at(member, location)
    elif origin in (tuple, list) and location and isinstance(location[0], int):
        yield from _dataclasses_at(arguments[0], location[1:])
    elif origin is dict and location:
        yield from _dataclasses_at(arguments[1], location[1:])
