"""How figures are written."""

import json
from typing import Any

__all__ = ["compact", "rounded"]


def rounded(value: Any) -> Any:
    """`value` with all floats in it to four digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def compact(value: Any, indent: int = 0) -> str:
    """JSON with one line for each list or object that holds no other one, so that a diff shows what changed."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value)
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {compact(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{' ' * indent}}}"
    return "[\n" + ",\n".join(inner + compact(item, indent + 1) for item in value) + f"\n{' ' * indent}]"
