"""Every kind of column that a Parquet file holds: three values each, a null among them."""

from __future__ import annotations

import struct
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa

DEEP = pa.list_(pa.struct([("when", pa.timestamp("ns")), ("tags", pa.list_(pa.uint64()))]))
UUIDS = [uuid.UUID(int=7).bytes, None, uuid.UUID(int=2**127).bytes]
NAN_WITH_PAYLOAD = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_BEEF))[0]


def _extension(kind: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


KINDS: dict[str, pa.Array] = {
    **{f"int{n}": pa.array([1, None, -(2 ** (n - 1))], f"int{n}") for n in (8, 16, 32, 64)},
    **{f"uint{n}": pa.array([1, None, 2**n - 1], f"uint{n}") for n in (8, 16, 32, 64)},
    "float16": pa.array([0.5, None, 65504.0], pa.float16()),
    "float32": pa.array([0.1, None, 3.4e38], pa.float32()),
    "float64": pa.array([0.1, None, 5e-324], pa.float64()),
    "odd floats": pa.array([NAN_WITH_PAYLOAD, -0.0, float("-inf")], pa.float64()),
    "bool": pa.array([True, None, False]),
    "null": pa.nulls(3),
    "nulls of a type": pa.nulls(3, pa.float32()),
    **{f"timestamp {u}": pa.array([1, None, 2**62], pa.timestamp(u)) for u in ("ms", "us", "ns")},
    "timestamp s": pa.array([1, None, -(2**40)], pa.timestamp("s")),
    "timestamp of a zone": pa.array([1, None, 2**62], pa.timestamp("us", tz="Asia/Seoul")),
    "timestamp of an offset": pa.array([1, None, 3], pa.timestamp("ms", tz="+09:00")),
    "timestamp before year 1": pa.array([-62135596800000001, None, 0], pa.timestamp("us")),
    "date": pa.array([10**7, None, -(10**7)], pa.date32()),
    "date64": pa.array([86_400_000, None, 0], pa.date64()),
    "time32": pa.array([1, None, 86_399_999], pa.time32("ms")),
    "time64 us": pa.array([1, None, 3], pa.time64("us")),
    "time64 ns": pa.array([1, None, 3001], pa.time64("ns")),
    **{
        f"duration {u}": pa.array([1, None, 2**62], pa.duration(u)) for u in ("s", "ms", "us", "ns")
    },
    "decimal128": pa.array([Decimal("1.10"), None, Decimal("-12345678.90")], pa.decimal128(18, 2)),
    "decimal256": pa.array([Decimal(10) ** 50, None, Decimal("1.5")], pa.decimal256(60, 2)),
    "string": pa.array(["a", None, "\uc61b\ub0a0 \U0001f984"]),
    "large string": pa.array(["a", None, ""], pa.large_string()),
    "string view": pa.array(["a", None, "more than twelve bytes"], pa.string_view()),
    "binary": pa.array([b"\x00\xff", None, b""]),
    "large binary": pa.array([b"\x00\xff", None, b""], pa.large_binary()),
    "binary view": pa.array([b"\x00\xff", None, b"more than twelve bytes"], pa.binary_view()),
    "fixed binary": pa.array([b"12345678", None, b"\x00" * 8], pa.binary(8)),
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "ordered dictionary": pa.DictionaryArray.from_arrays(
        pa.array([1, None, 0], pa.int8()), pa.array(["low", "high"]), ordered=True
    ),
    "dictionary of bytes": pa.array([b"a", None, b"a"]).dictionary_encode(),
    "list": pa.array([[0.1, None], None, []], pa.list_(pa.float32())),
    "large list": pa.array([[1], None, []], pa.large_list(pa.int8())),
    "list view": pa.array([[1], None, [2, 3]], pa.list_view(pa.int16())),
    "fixed list": pa.array([[0.1, 0.2], None, [0.3, 0.4]], pa.list_(pa.float32(), 2)),
    "list of lists": pa.array([[[1], None], None, [[]]], pa.list_(pa.list_(pa.uint8()))),
    "list of nulls": pa.array([[], None, [None]], pa.list_(pa.null())),
    "list of not null": pa.array(
        [[1], None, []], pa.list_(pa.field("item", pa.int64(), nullable=False))
    ),
    "list of dictionaries": pa.ListArray.from_arrays(
        [0, 1, 2, 3], pa.array(["a", "b", "a"]).dictionary_encode()
    ),
    "struct": pa.array([{"a": 1}, None, {"a": None}], pa.struct([("a", pa.int32())])),
    "struct with a nameless field": pa.array([{"": 1}, None, {"": 2}], pa.struct([("", "int64")])),
    "struct of a dictionary": pa.StructArray.from_arrays(
        [pa.array(["x", "y", "x"]).dictionary_encode()], names=["d"]
    ),
    "chat": pa.array(
        [[{"role": "user", "content": "hi"}], None, []],
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())])),
    ),
    "nested twice": pa.array(
        [[{"when": 1704067200123456789, "tags": [2**64 - 1]}], None, [None]], DEEP
    ),
    "struct of structs": pa.array(
        [{"a": {"b": 1}}, None, {"a": None}],
        pa.struct([("a", pa.struct([("b", pa.duration("ns"))]))]),
    ),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "map of bytes": pa.array([[("k", b"\xff")], None, []], pa.map_(pa.string(), pa.binary())),
    "map with a key twice": pa.array([[("k", 1), ("k", 2)], None, []], pa.map_("string", "int8")),
    "sorted map": pa.array(
        [[("k", 1)], None, []], pa.map_(pa.string(), pa.int64(), keys_sorted=True)
    ),
    "list of maps": pa.array(
        [[[("k", 1)]], None, []], pa.list_(pa.map_(pa.string(), pa.decimal128(9, 3)))
    ),
    "uuid": _extension(pa.uuid(), UUIDS),
    "json": _extension(pa.json_(), ['{"a": 1}', None, "[]"]),
    "opaque": _extension(pa.opaque(pa.int32(), "x", "y"), [1, None, 2]),
    "bool8": _extension(pa.bool8(), [1, None, 0]),
    "tensor": _extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[0.1, 0.2], None, [1.0, 2.0]]),
}
