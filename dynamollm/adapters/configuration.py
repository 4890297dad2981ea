"""Read the configuration: a YAML file (or the built-in one), then ``DYNAMOLLM_*`` variables over it.

``DYNAMOLLM_SERVER__PORT=9000`` sets ``server.port``; a double underscore steps into a section or a list index
(``DYNAMOLLM_POOLS__0__TP=4``), and the value is read as YAML. ``DYNAMOLLM_DATA`` (folder of public data) and
``DYNAMOLLM_VLLM`` (environment of a test vLLM) are no keys.
"""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from dynamollm.settings import Settings, check
from dynamollm.validation import ConfigurationError, build

PREFIX = "DYNAMOLLM_"
NOT_KEYS = frozenset({"DYNAMOLLM_DATA", "DYNAMOLLM_CONFIG", "DYNAMOLLM_VLLM"})
DEFAULT = "default.yaml"
BUILT_IN = {"vllm-emulated": "vllm-emulated.yaml"}  # by engine: real servers take a gigabyte each, so there are fewer


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e3 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: Path | None, environ: Mapping[str, str], engine: str | None = None) -> Settings:
    """Return the validated settings of ``path`` (None: a built-in cluster) under the environment's overrides.

    ``engine`` stands for ``driver.kind``, over both. Raises ``ConfigurationError`` naming every problem with its path.
    """
    source = str(path) if path else "built-in configuration"
    plain = apply_environment(_read(path, source, BUILT_IN.get(engine or "", DEFAULT)), environ)
    if engine is not None:
        plain = _with(plain, ["driver", "kind"], engine, "--engine")
    settings = build(Settings, plain, source)
    problems = check(settings)
    if problems:
        raise ConfigurationError(source, problems)
    return settings


def _read(path: Path | None, source: str, built_in: str) -> dict[str, Any]:
    try:
        text = path.read_text() if path else files("dynamollm").joinpath(built_in).read_text()
    except FileNotFoundError:
        raise ConfigurationError(source, ["no such file; `dynamollm config show` prints one to start from"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(source, [f"cannot be read: {error}"]) from None
    plain = parse_yaml(text, source)
    if not isinstance(plain, dict):
        raise ConfigurationError(source, [f"must hold a mapping of keys, not {type(plain).__name__}"])
    return plain


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML; raise ``ConfigurationError`` with line and column where it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigurationError(source, [f"{place}{error.problem}"]) from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigurationError(source, [" ".join(str(error).split())]) from None


def apply_environment(plain: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return ``plain`` with every ``DYNAMOLLM_*`` variable set over it; the argument is left as it is."""
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in NOT_KEYS:
            location = variable[len(PREFIX) :].lower().split("__")
            value = parse_yaml(environ[variable], variable)
            plain = _with(plain, location, value, variable)
    return plain


def _with(node: Any, location: list[str], value: Any, variable: str) -> Any:
    if not location:
        return value
    head, rest = location[0], location[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigurationError(variable, [f"{head!r} is not an index below {len(node)}"])
        return [
            _with(child, rest, value, variable) if index == int(head) else child for index, child in enumerate(node)
        ]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ConfigurationError(variable, [f"{head!r}: the key above it holds a plain value"])
    # names of pools and such keep their case: DYNAMOLLM_DRIVER__URLS__LL finds key LL
    key = next((known for known in node if str(known).lower() == head), head)
    return {**node, key: _with(node.get(key), rest, value, variable)}
