"""Columns of tables: the type that each is read as, and the stored types that it accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa


def _is_text(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found))


def _is_text_or_bytes(found: pa.DataType) -> bool:
    """Return whether a type is text or bytes; some tools store text as plain bytes."""
    return _is_text(found) or _is_bytes(found)


def _is_identifier(found: pa.DataType) -> bool:
    return _is_text_or_bytes(found) or bool(pa.types.is_integer(found))


def _is_bytes(found: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(found) for is_kind in kinds)


def _is_picture(found: pa.DataType) -> bool:
    """Return whether a type is bytes, or the struct {bytes, path} of Hugging Face's data sets."""
    if not pa.types.is_struct(found):
        return _is_bytes(found)
    place, path = found.get_field_index("bytes"), found.get_field_index("path")
    return place >= 0 and BYTES.takes(found.field(place).type) and (path < 0 or TEXT.takes(found.field(path).type))


def _is_number(found: pa.DataType) -> bool:
    return any(is_kind(found) for is_kind in (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal))


def is_any_list(found: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's five list types."""
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{kind}")(found) for kind in kinds)


def list_depth(kind: pa.DataType) -> int:
    """Return how many lists are around a value: 0 for a type that is no list."""
    return 1 + list_depth(kind.value_type) if is_any_list(kind) else 0


@dataclass(frozen=True, slots=True)
class Column:
    """Type that a column is read as, and the stored types that it is accepted in.

    Attributes:
        type: Type of the column after reading.
        expected: Name of the required type in error messages.
        accepts: Function that returns whether a stored type, neither null nor a dictionary, can be
            converted to `type`.
        item: Column of the items of a list, used instead of `accepts`; None for other types.
        takes_one: Whether a list is also read from a single item, as a list of that item.
        stored_names: Names that a file may have the column under, the first that it has counts;
            empty: the column's own name. Behind the first, a column of another type is ignored.
    """

    type: pa.DataType
    expected: str
    accepts: Callable[[pa.DataType], bool] = lambda found: True
    item: Column | None = None
    takes_one: bool = False
    stored_names: tuple[str, ...] = ()

    @classmethod
    def list_of(cls, item: Column) -> Column:
        """Return a column of lists of `item`."""
        return cls(pa.list_(item.type), f"list of {item.expected}s", item=item)

    @classmethod
    def one_or_list_of(cls, item: Column) -> Column:
        """Return a column of lists of `item`, in which a table may also store one item per row."""
        return cls(pa.list_(item.type), f"{item.expected} or list of {item.expected}s", item=item, takes_one=True)

    @classmethod
    def like(cls, wanted: pa.DataType) -> Column:
        """Return a column that accepts a type and the types that differ from it only in width.

        A struct may lack fields, which are null then.
        """
        if pa.types.is_string(wanted):
            return cls(wanted, "string", _is_text)
        if pa.types.is_list(wanted):
            return cls.list_of(cls.like(wanted.value_type))
        for is_kind in (pa.types.is_integer, pa.types.is_floating):
            if is_kind(wanted):
                return cls(wanted, str(wanted), is_kind)
        if pa.types.is_struct(wanted):
            items = {field.name: cls.like(field.type) for field in wanted}
            return cls(
                wanted,
                str(wanted),
                lambda found: (
                    pa.types.is_struct(found)
                    and all(
                        found.get_field_index(name) < 0 or item.takes(found.field(name).type)
                        for name, item in items.items()
                    )
                ),
            )
        return cls(wanted, str(wanted), wanted.equals)

    def takes(self, found: pa.DataType) -> bool:
        """Return whether the column can be read from the stored type `found`."""
        if pa.types.is_dictionary(found):
            return self.takes(found.value_type)
        if pa.types.is_null(found):
            return True
        if self.item is not None:
            is_list = is_any_list(found) and self.item.takes(found.value_type)
            return is_list or (self.takes_one and self.item.takes(found))
        return self.accepts(found)


TEXT = Column(pa.large_string(), "string", _is_text_or_bytes)
IDENTIFIER = Column(pa.large_string(), "string", _is_identifier)
BYTES = Column(pa.large_binary(), "binary", _is_bytes)
NUMBER = Column(pa.float64(), "number", _is_number)
BOOLEAN = Column(pa.bool_(), "boolean", pa.types.is_boolean)

FEATURES = Column.list_of(Column(pa.float64(), "float", pa.types.is_floating))
# `image` is the name in Hugging Face's data sets.
PICTURE = Column(pa.large_binary(), "binary", _is_picture, stored_names=("image_bytes", "image"))
