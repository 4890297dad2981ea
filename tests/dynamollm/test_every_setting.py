"""Every key of the configuration, walked by its own schema: each is checked, each refusal names it, each can be set
from the environment. A key added tomorrow is tested tomorrow."""

import copy
import difflib
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from dynamollm.adapters.configuration import load
from dynamollm.settings import Settings
from dynamollm.validation import ConfigurationError, field_names, path_of

SCHEMA = TypeAdapter(Settings).json_schema()
# a tree that holds one of everything, so that every key has a place
WHOLE = {
    "models": [{"name": "m", "profile": "llama-3.1-70b-fp8-h100"}],
    "nodes": [{"name": "n", "gpus": 8}],
    "pools": [{"name": "all", "model": "m", "request_class": "LL", "tp": 8}],
    "objectives": [{"name": "urgent", "priority": 1}],
}


def resolved(schema):
    """A schema with its reference followed."""
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def alternatives(schema):
    """What a value may be; null left out."""
    return [resolved(one) for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]


def walk(schema, location=()):
    """Every (location, schema) of a plain value, lists of sections entered at their first."""
    for one in alternatives(resolved(schema)):
        if "properties" in one:
            for name, inner in one["properties"].items():
                yield from walk(inner, (*location, name))
        elif one.get("type") == "array" and "$ref" in one.get("items", {}):
            yield from walk(one["items"], (*location, 0))
        else:
            yield location, one


LEAVES = list(walk(SCHEMA))
NAMED = [pytest.param(location, schema, id=path_of(location)) for location, schema in LEAVES]


def with_value(location, value):
    """The whole tree with one value set."""
    tree = copy.deepcopy(WHOLE)
    node = tree
    for part, following in pairwise(location):
        empty = [] if isinstance(following, int) else {}
        node = node[part] if isinstance(part, int) else node.setdefault(part, empty)
        if isinstance(following, int) and not node:
            node.append({})
    node[location[-1]] = value
    return tree


def refusal(tmp_path: Path, tree) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigurationError) as caught:
        load(path, {})
    return "\n".join(caught.value.problems)


def of_other_type(schema):
    """Values that no key of this type takes."""
    match schema.get("type"):
        case "integer":
            return ["many", 1.5, [], {}]
        case "number":
            return ["many", [], {}]
        case "boolean":
            return ["perhaps", 7, []]
        case "string":
            return [7, [], {}]
        case "array":
            return ["many", 7]
        case "object":
            return ["many", 7, []]
    return [{"no": "such"}]  # an enumeration


def beyond(schema):
    """Numbers just outside the bounds of a schema."""
    step = 1 if schema.get("type") == "integer" else 1e-6
    if "minimum" in schema:
        yield schema["minimum"] - step
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"]
    if "maximum" in schema:
        yield schema["maximum"] + max(step, abs(schema["maximum"]) * 1e-9)


def test_the_walk_meets_the_whole_tree():
    met = {path_of(location) for location, _ in LEAVES}
    for known in ("server.port", "pools[0].tp", "slo.cuts.input_tokens", "driver.vllm.command", "limits.body_bytes"):
        assert known in met
    assert len(met) > 50


@pytest.mark.parametrize(("location", "schema"), NAMED)
def test_a_value_of_another_type_is_refused_by_its_path(tmp_path, location, schema):
    for wrong in of_other_type(schema):
        told = refusal(tmp_path, with_value(location, wrong))
        assert path_of(location) in told, f"{wrong!r}: {told}"


@pytest.mark.parametrize(("location", "schema"), [p for p in NAMED if list(beyond(p.values[1]))])
def test_a_number_out_of_bounds_is_refused_with_the_bound(tmp_path, location, schema):
    for wrong in beyond(schema):
        told = refusal(tmp_path, with_value(location, wrong))
        assert path_of(location) in told
        assert "should be" in told


@pytest.mark.parametrize(("location", "schema"), [p for p in NAMED if "enum" in p.values[1]])
def test_a_choice_names_its_choices(tmp_path, location, schema):
    told = refusal(tmp_path, with_value(location, 3 if isinstance(schema["enum"][0], int) else "other"))
    assert path_of(location) in told
    assert all(str(choice) in told for choice in schema["enum"])


@pytest.mark.parametrize(("location", "schema"), NAMED)
def test_a_misspelt_key_is_told_the_right_one(tmp_path, location, schema):
    name = location[-1]
    siblings = field_names(Settings, location[:-1])
    misspelt = next(
        word
        for word in (name[:-1] + "x" + name[-1:], name + "x", "x" + name)
        if word not in siblings and difflib.get_close_matches(word, siblings, n=1, cutoff=0.6) == [name]
    )
    tree = with_value((*location[:-1], misspelt), 1)
    if location[0] in WHOLE:
        tree[location[0]] = copy.deepcopy(WHOLE[location[0]])
        tree[location[0]][0][misspelt] = 1
    told = refusal(tmp_path, tree)
    assert path_of((*location[:-1], misspelt)) in told
    assert f"did you mean {name}" in told


def defaults():
    """(path, location, value) of every plain default that a file may leave out."""
    shown = TypeAdapter(Settings).dump_python(load(None, {}), mode="json")
    for location, _ in LEAVES:
        if location[0] in ("models", "nodes", "pools", "objectives"):
            continue
        node = shown
        for part in location:
            node = node[part]
        if node is not None and (not isinstance(node, float) or math.isfinite(node)):
            yield pytest.param(location, node, id=path_of(location))


@pytest.mark.parametrize(("location", "value"), list(defaults()))
def test_each_default_may_be_written_out_and_set_from_the_environment(location, value):
    variable = "DYNAMOLLM_" + "__".join(str(part).upper() for part in location)
    assert load(None, {variable: json.dumps(value)}) == load(None, {})


def test_the_schema_says_what_each_section_is_for():
    for name, section in SCHEMA["$defs"].items():
        assert section.get("description"), f"{name} has no docstring"
        assert section["additionalProperties"] is False, f"{name} takes unknown keys"
