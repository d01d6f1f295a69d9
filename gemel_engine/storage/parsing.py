"""Makes numbers, truth values and lists of text, as tables in text hold them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pyarrow as pa

_SEPARATOR = "|"  # of the items of a list that is not JSON
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_INTEGER = re.compile(r"\s*([+-]?\d{1,19})(?:\.0*)?\s*")  # pandas writes integers beside nulls as 3.0


@dataclass(frozen=True)
class UnparsedError(Exception):
    """A text is not of the wanted type.

    Attributes:
        row: Row of the text, from 1.
        text: The text.
        expected: Name of the wanted type.
    """

    row: int
    text: str
    expected: str


def is_parsed(wanted: pa.DataType) -> bool:
    """Return whether `parse` makes values of a type."""
    if pa.types.is_list(wanted):
        return is_parsed(wanted.value_type) or bool(pa.types.is_large_string(wanted.value_type))
    return bool(pa.types.is_int64(wanted) or pa.types.is_float64(wanted) or pa.types.is_boolean(wanted))


def parse(values: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Make integers, numbers, truth values, or lists, which are JSON, or items separated by `|`.

    Text without characters but white space is null.

    Raises:
        UnparsedError: A text is not of the wanted type.
    """
    parsed = []
    for row, text in enumerate(values.to_pylist(), 1):
        try:
            parsed.append(None if text is None or not text.strip() else _parsed(text, wanted))
        except (ValueError, RecursionError) as error:
            raise UnparsedError(row, text, _described(wanted)) from error
    return pa.array(parsed, wanted)


def _parsed(text: str, wanted: pa.DataType) -> object:
    if pa.types.is_list(wanted):
        items = json.loads(text) if _is_json_list(text) else text.split(_SEPARATOR)
        texts = [item if item is None or isinstance(item, str) else json.dumps(item) for item in items]
        if texts and pa.types.is_list(wanted.value_type) and not any(map(_is_json_list, texts)):
            return [_parsed(text, wanted.value_type)]  # one item instead of a list
        is_text = pa.types.is_large_string(wanted.value_type)
        return texts if is_text else [_parsed(item or "", wanted.value_type) for item in texts]
    if pa.types.is_float64(wanted):
        return float(text)
    if pa.types.is_boolean(wanted):
        if (value := _BOOLEANS.get(text.strip().lower())) is None:
            raise ValueError("not a truth value")
        return value
    found = _INTEGER.fullmatch(text)
    if found is None or abs(int(found[1])) >= 1 << 63:
        raise ValueError("not an integer of 64 bits")
    return int(found[1])


def _is_json_list(text: str | None) -> bool:
    return text is not None and text.lstrip().startswith("[")


def _described(wanted: pa.DataType) -> str:
    if pa.types.is_list(wanted):
        return f"a list in JSON, or items separated by {_SEPARATOR}"
    if pa.types.is_boolean(wanted):
        return "true or false"
    return "an integer" if pa.types.is_int64(wanted) else "a number"
