"""Brings the tools and tool calls of records into one form: objects at every depth, also where a record has JSON text.

A tool or a call is ``{"name": ..., ...}``, or has a wrapper ``{"type": "function", "function": {"name": ..., ...}}``.
In every function, `where` is the place of the record, for error messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_brain.data.json_values import from_json, is_blank, require_json, without_nulls
from megatron_brain.errors import RecordError, short

_MISNAMED_ARGUMENTS = ("parameters", "input", "args", "kwargs", "params")
"""Names that other formats use for the arguments of a call."""

_SCHEMAS = ("parameters", "input_schema", "inputSchema")
"""Names of the schema of a tool's arguments: OpenAI's, Anthropic's and MCP's."""

_INNER_SCHEMAS = {"properties": dict, "items": dict, "required": list, "enum": list}
"""Parts of a schema that may be JSON text."""


def check_tools(record: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The functions that a record's ``tools`` describe, as objects; None where there are none.

    The field, a tool and the parameters of a tool may be JSON text.

    Raises:
        RecordError: the field is not a list of objects, or holds a value that is not JSON.
    """
    tools = from_json(record.get("tools"), list, "field 'tools'", where, blank=list)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RecordError(where, "bad tools", f"field 'tools' must be a list of objects, not {short(tools)}")
    checked = [_check_tool(tool, f"tools[{index}]", where) for index, tool in enumerate(tools)]
    return require_json(checked, "tools", where)


def check_call(call: Any, place: str, where: str) -> dict[str, Any]:
    """A call of a tool with its arguments as an object."""
    call = from_json(call, dict, place, where)
    if not isinstance(call, dict):
        raise RecordError(where, "bad messages", f"{place} must be an object, not {short(call)}")
    if "function" in call:
        _refuse_misnamed_arguments(call, ("arguments", *_MISNAMED_ARGUMENTS), f"{place}.function", where)
        return {**call, "function": check_call(call["function"], f"{place}.function", where)}
    if not isinstance(call.get("name"), str):
        raise RecordError(where, "bad messages", f"{place} has no text 'name', the function that is called")
    if "arguments" not in call:
        _refuse_misnamed_arguments(call, _MISNAMED_ARGUMENTS, place, where)
        return {**call, "arguments": {}}
    arguments = from_json(call["arguments"], dict, f"{place}.arguments", where, blank=dict)
    if not isinstance(arguments, dict):
        raise RecordError(
            where,
            "bad messages",
            f"{place}.arguments must be an object, or the JSON text of one, not {short(call['arguments'])}",
        )
    return {**call, "arguments": require_json(arguments, f"{place}.arguments", where)}


def called_functions(tools: Any) -> Iterator[dict[str, Any]]:
    """Tools or calls of tools without the wrapper ``{"type": "function", "function": ...}`` that they may have."""
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict):
            yield function


def change_function(call: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A call with its function changed. Without a wrapper, the call itself is the function."""
    return {**call, "function": change(call["function"])} if "function" in call else change(call)


def _refuse_misnamed_arguments(call: Mapping[str, Any], names: Sequence[str], place: str, where: str) -> None:
    """Raise where a call has its arguments under another name or in another place: they would be lost."""
    if misnamed := [name for name in names if not is_blank(call.get(name))]:
        raise RecordError(
            where,
            "unsupported field",
            f"{place} has no 'arguments', and {misnamed[0]!r} is given: rename it to 'arguments', beside 'name'",
        )


def _check_tool(tool: Any, place: str, where: str) -> dict[str, Any]:
    """A tool with its schemas as objects."""
    tool = from_json(tool, dict, place, where)
    if not isinstance(tool, dict):
        raise RecordError(where, "bad tools", f"{place} must be an object, not {short(tool)}")
    tool = without_nulls(tool)
    if "function" in tool:
        return {**tool, "function": _check_tool(tool["function"], f"{place}.function", where)}
    schemas = {
        name: _check_schema(tool[name], f"{place}.{name}", where, blank=dict) for name in _SCHEMAS if name in tool
    }
    return {**tool, **schemas}


def _check_schema(schema: Any, place: str, where: str, *, blank: type | None = None) -> dict[str, Any]:
    """A JSON schema as an object, and so the schemas of its properties."""
    schema = from_json(schema, dict, place, where, blank=blank)
    if not isinstance(schema, dict):
        raise RecordError(where, "bad tools", f"{place} must be an object, not {short(schema)}")
    checked: dict[str, Any] = dict(schema)
    for name, kind in _INNER_SCHEMAS.items():
        if isinstance(checked.get(name), str):
            checked[name] = from_json(checked[name], kind, f"{place}.{name}", where)
    if isinstance(properties := checked.get("properties"), dict):
        checked["properties"] = {
            name: _check_schema(inner, f"{place}.properties.{name}", where) if isinstance(inner, str | dict) else inner
            for name, inner in properties.items()
        }
    return checked
