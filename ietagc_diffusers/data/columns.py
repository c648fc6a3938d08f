"""Columns as Arrow arrays: of Python values without guessing types, and of stored ones in the types used here."""

import json
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, LargeList, NamedSplit, Sequence, Value
from datasets import Image as ImageFeature

from .text_files import writable

STORED_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def array_of(values: list[Any]) -> pa.Array:
    """Python values as an Arrow array.

    Strings stay strings, whatever they look like. Among strings, a number is the text that it is written as; among
    lists of strings, a string is a list of one. What Arrow has no type for becomes JSON texts.
    """
    kinds = {type(value) for value in values} - {type(None)}
    if float in kinds and kinds > {float}:  # not a number is how tables write that there is nothing
        values = [None if value != value else value for value in values]
    if kinds <= {str}:
        return _of_strings(values)
    if kinds == {str, list}:
        values, kinds = [[value] if isinstance(value, str) else value for value in values], {list}
    try:
        if str in kinds:
            raise pa.ArrowInvalid("mixed with strings")
        return pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        if kinds == {list}:
            return _of_lists(values)
        return _of_strings([value if value is None or isinstance(value, str) else _json(value) for value in values])


def _of_strings(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeError:
        return pa.array([value and writable(value) for value in values], pa.string())


def _of_lists(values: list[Any]) -> pa.Array:
    """Lists of strings; what is no string in them becomes its JSON text, None stays."""

    def text(value):
        return value if value is None else writable(value if isinstance(value, str) else _json(value))

    return pa.array(
        [value if value is None else [text(one) for one in value] for value in values], pa.list_(pa.string())
    )


def _json(value):
    return json.dumps(value, default=str, ensure_ascii=False)


def is_text(feature: Any) -> bool:
    """Whether a column's feature is that of strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_texts(feature: Any) -> bool:
    """Whether a column's feature is that of lists of strings."""
    if isinstance(feature, list):
        return is_text(feature[0])
    return isinstance(feature, (Sequence, LargeList)) and is_text(feature.feature)


def with_images(rows: Dataset, column: str, folder: str | None = None) -> Dataset:
    """The rows with a column of images, in whatever type it is stored, as ``datasets.Image``; else as they are.

    ``folder``: that paths in the column are relative to.
    """
    feature = rows.features[column]
    if isinstance(feature, ImageFeature):
        return rows if feature.decode else rows.cast_column(column, ImageFeature())
    table = rows.data.table
    make = image_maker(table.schema.field(column).type)
    if make is None:
        return rows
    return _replaced(rows, column, lambda chunk: _below(folder, make(chunk)), ImageFeature())


def with_texts(rows: Dataset, column: str) -> Dataset:
    """The rows with a column of texts, in whatever type it is stored, as strings or lists of strings."""
    feature = rows.features[column]
    stored = rows.data.table.schema.field(column).type
    if is_text(feature) or not _is_texts(stored):
        return rows
    if _is_list(stored):
        kind, feature = (
            pa.list_(pa.string()),
            Features.from_arrow_schema(pa.schema([("x", pa.list_(pa.string()))]))["x"],
        )
        return _replaced(rows, column, lambda chunk: _cast_list(chunk, kind), feature)
    return _replaced(rows, column, _as_string, Value("string"))


def _is_text(kind):
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(test(kind) for test in tests) or pa.types.is_large_binary(kind)


def _is_list(kind):
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _is_texts(kind):
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _as_string(chunk):
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    return chunk.cast(pa.string())


def _cast_list(chunk, kind):
    try:
        return chunk.cast(kind)
    except (pa.ArrowException, NotImplementedError):
        values = chunk.to_pylist()
        return pa.array(
            [None if v is None else [t.decode() if isinstance(t, bytes) else t for t in v] for v in values], kind
        )


def image_maker(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes ``STORED_IMAGE`` of an array of a type; None for a type that holds no images."""
    if pa.types.is_struct(kind):
        return _of_struct if {field.name for field in kind} & {"bytes", "path"} else None
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return (lambda chunk: _stored(None, _as_string(chunk))) if _is_text(kind) else None
    if pa.types.is_string_view(kind):
        return lambda chunk: _stored(None, _as_string(chunk))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view():
        return lambda chunk: _stored(chunk.cast(pa.binary()), None)
    if _is_list(kind) and kind.value_type in (pa.uint8(), pa.int8()):
        return _of_byte_lists
    if _is_list(kind) and _is_list(kind.value_type):
        return ImageFeature().cast_storage
    return None


def _stored(inside: Any, paths: Any) -> pa.Array:
    length = len(inside if inside is not None else paths)
    inside = pa.nulls(length, pa.binary()) if inside is None else inside
    paths = pa.nulls(length, pa.string()) if paths is None else paths
    missing = pc.and_(pc.is_null(inside), pc.is_null(paths))
    return pa.StructArray.from_arrays([inside, paths], ["bytes", "path"], mask=missing)


def _below(folder, stored):
    """Stored images whose files are named relative to a folder, with their whole paths."""
    if folder is None:
        return stored
    inside, paths = stored.field("bytes"), stored.field("path")
    relative = pc.invert(pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://")))
    whole = pc.binary_join_element_wise(folder, paths, "/")
    return _stored(inside, pc.if_else(pc.and_(pc.is_null(inside), relative), whole, paths))


def _of_struct(chunk):
    names = {field.name for field in chunk.type}
    inside = chunk.field("bytes").cast(pa.binary()) if "bytes" in names else None
    paths = chunk.field("path").cast(pa.string()) if "path" in names else None
    return _stored(inside, paths)


def _of_byte_lists(chunk):
    """The bytes of lists of numbers from 0 to 255."""
    values = [None if one is None else one.values for one in chunk]
    inside = [None if one is None else one.to_numpy(zero_copy_only=False).astype("uint8").tobytes() for one in values]
    return _stored(pa.array(inside, pa.binary()), None)


def _replaced(rows, column, make, feature):
    """The rows with a converted column, chunk by chunk; the other columns stay in the file that they come from."""
    table = rows.data.table
    place = table.schema.get_field_index(column)
    chunks = [make(chunk) for chunk in table[column].chunks]
    kind = chunks[0].type if chunks else STORED_IMAGE
    table = table.set_column(place, column, pa.chunked_array(chunks, kind))
    return made(table, Features(rows.features | {column: feature}), rows.split)


def made(table: pa.Table, features: Features, split: Any = None) -> Dataset:
    """Rows of a table. Nothing that `datasets` keeps of other rows is ever taken for theirs."""
    split = None if split is None else NamedSplit(str(split))
    info = DatasetInfo(features=features)
    return Dataset(table.replace_schema_metadata(None), info=info, split=split, fingerprint=uuid.uuid4().hex)
