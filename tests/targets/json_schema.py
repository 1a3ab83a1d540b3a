"""The part of JSON Schema that pydantic writes, as a checker of a page: does a document follow a schema?"""

from collections.abc import Iterator
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    *("$ref", "$defs", "anyOf", "type", "const", "enum", "properties", "required", "additionalProperties", "items"),
    *("minItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "title", "description", "default"),
}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, where: str = "") -> Iterator[str]:
    """What breaks the schema, in words; raises KeyError for a keyword that this does not know."""
    root = root or schema
    if set(schema) - KNOWN:
        raise KeyError(f"{where}: unknown keywords {set(schema) - KNOWN}")
    if "$ref" in schema:
        yield from problems(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, where)
    if "anyOf" in schema and all(list(problems(value, one, root, where)) for one in schema["anyOf"]):
        yield f"{where}: {value!r} fits none of the forms"
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{where}: {value!r} is no {kind}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    for keyword, broken in {
        "minimum": lambda limit: value < limit,
        "maximum": lambda limit: value > limit,
        "exclusiveMinimum": lambda limit: value <= limit,
        "exclusiveMaximum": lambda limit: value >= limit,
        "minItems": lambda limit: len(value) < limit,
    }.items():
        if keyword in schema and broken(schema[keyword]):
            yield f"{where}: {value!r} breaks {keyword} {schema[keyword]}"
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), root, f"{where}[{place}]")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            other = schema.get("additionalProperties", {})
            if name in known or isinstance(other, dict):
                yield from problems(item, known.get(name, other), root, f"{where}.{name}")
            elif other is False:
                yield f"{where}: {name} is unknown"
