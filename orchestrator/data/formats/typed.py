"""Columns of Parquet files and hub datasets, which have types -> text. Called by `parquet` and `hub`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import DataError

ClassNames = Sequence[str] | None
"""Names of the classes that a column of numbers stands for, by number; None where it stands for itself."""
_EXACT = float(2**53)  # Whole numbers up to here are exact in a float.


def as_text(values: Any, *, name: str, location: object, first_row: int, class_names: ClassNames = None) -> Any:
    """A pyarrow array as one of strings: empty for nothing, NaN and a negative class number.

    Numbers are written in the shortest form, whole ones without a point, truth values as true and false, times as ISO
    8601, bytes as the UTF-8 that they are. Raises DataError for lists and structures, and for bytes that are no text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if class_names is not None and pa.types.is_integer(kind):
        return _named(values, class_names, name=name, location=location, first_row=first_row)
    if pa.types.is_nested(kind):
        raise _no_text(name, location, kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        values = _decoded(values, name=name, location=location, first_row=first_row)
    elif pa.types.is_floating(kind):
        values = _shortest(values)
    try:
        return pc.fill_null(values.cast(pa.string()), "")
    except pa.ArrowException as error:
        raise _no_text(name, location, kind) from error


def _shortest(values: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if str(values.type) == "halffloat":
        values = values.cast(pa.float32())
    values = pc.if_else(pc.is_nan(values), None, values)
    whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), pa.scalar(_EXACT, values.type)))
    digits = pc.if_else(whole, values, 0).cast(pa.int64()).cast(pa.string())
    return pc.if_else(whole, digits, values.cast(pa.string()))


def _named(values: Any, class_names: Sequence[str], *, name: str, location: object, first_row: int) -> Any:
    import pyarrow as pa

    numbers = values.to_pylist()
    for row, number in enumerate(numbers, start=first_row + 1):
        if number is not None and number >= len(class_names):
            raise DataError(
                f"column {name!r} of {location} has a class number without a name",
                got=f"{number} in row {row}",
                allowed=f"0 to {len(class_names) - 1}",
                do="write the dataset anew with all its class names",
            )
    return pa.array(["" if n is None or n < 0 else class_names[n] for n in numbers], pa.string())


def _decoded(values: Any, *, name: str, location: object, first_row: int) -> Any:
    import pyarrow as pa

    try:
        return values.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowException:
        for row, value in enumerate(values.to_pylist(), start=first_row + 1):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"column {name!r} of {location} holds bytes that are no text",
                    got=f"{value[:20]!r} in row {row}",
                    allowed="text, or bytes in UTF-8",
                    do="name another column, or write this one as strings",
                ) from error
        raise


def _no_text(name: str, location: object, kind: object) -> DataError:
    return DataError(
        f"column {name!r} of {location} does not hold text",
        got=f"values of type {str(kind)[:60]}",
        allowed="strings, numbers, truth values, times",
        do="name another column, or write this one as strings",
    )


def class_names_of(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Class names by column, as `datasets` writes them into the schema of a Parquet file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
