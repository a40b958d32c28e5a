"""The metadata of a GGUF comes out as what the file says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, U64, Value, array, scalar, tiny_llama

from loops.engine.gguf_format import read_header


def read_back(value: Value, folder: Path) -> tuple[str, object]:
    """Write one more metadata value into a sound file; return its type and itself as they are read."""
    fake = tiny_llama()
    fake.keys["mine"] = value
    header = read_header(fake.write(folder / "model.gguf"))
    return header.value_types["mine"], header.metadata["mine"]


SCALARS = [(U8, "UINT8", 200), (U16, "UINT16", 60_000), (U32, "UINT32", 4_000_000_000), (I32, "INT32", -5),
           (F32, "FLOAT32", 0.25), (U64, "UINT64", 2**63), (STRING, "STRING", "a word"), (BOOL, "BOOL", True),
           (BOOL, "BOOL", False)]


@pytest.mark.parametrize(("kind", "name", "value"), SCALARS)
def test_a_value_comes_back_with_its_type_alone_and_in_an_array(
        kind: int, name: str, value: object, tmp_path: Path) -> None:
    told, found = read_back(scalar(kind, value), tmp_path)
    assert (told, found, type(found)) == (name, value, type(value))
    told, found = read_back(array(kind, [value, value]), tmp_path)
    assert (told, found) == (f"ARRAY[{name}]", (value, value))
    assert isinstance(found, tuple)
    assert {type(item) for item in found} == {type(value)}


def test_any_byte_but_zero_is_true(tmp_path: Path) -> None:
    assert read_back(Value(BOOL, b"\x02"), tmp_path) == ("BOOL", True)
    two = Value(ARRAY, array(BOOL, [True, False]).raw.replace(b"\x01\x00", b"\xff\x00"))
    assert two.raw.endswith(b"\xff\x00")
    assert read_back(two, tmp_path) == ("ARRAY[BOOL]", (True, False))
