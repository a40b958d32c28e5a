"""Where rows come from: JSON, JSON lines, CSV, TSV, Parquet and text files, folders of them, the Hugging Face hub.

Rows stay as they stand there; `loops.finetune.records` makes conversations of them. Parquet takes the library pyarrow,
folders saved by Hugging Face's library and the hub take that library; both come with the extra `nightpress[train]`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loops.finetune.extra import require
from loops.finetune.faults import ColumnsWrong, DatasetUnreadable, EncodingWrong, ParquetBroken
from state.files import sha256_file

MAX_BYTES = 4 << 30  #: of one text file, which is read whole
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"

_SPLIT_IN_NAME = re.compile(r"(?:^|.*[-_.])(train|training|validation|valid|val|dev|eval|test)(?:[-_.].*)?",
                            re.IGNORECASE)
_SPLIT_NAMES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation",
                "eval": "validation"}
_NOT_DATA = {MANIFEST, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "report.json"}
_LISTS = ("data", "rows", "train", "examples", "items")  #: keys under which a JSON document may keep its rows
_MAX_FIELD = 1 << 27  #: characters of one field of CSV; the library's default refuses long documents

Rows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Source:
    """Rows as they stand in one file, or in one split of a dataset.

    Attributes:
        name: of the file, without its folder, or of the dataset.
        kind: json, jsonl, csv, tsv, text, parquet, folder, hub or sample.
        rows: by the names of their columns.
        split: train, validation, test or what the dataset calls it; empty where it is not said.
        sha256: of the file; empty for a dataset.
        revision: of the dataset on the hub.
        licence: as its card says.
    """

    name: str
    kind: str
    rows: Rows
    split: str = ""
    sha256: str = ""
    revision: str = ""
    licence: str = ""


def read_path(path: Path) -> list[Source]:
    """Return what a file holds, or the files of a folder, or a folder that Hugging Face's library saved.

    Raises:
        DatasetUnreadable: it is missing, of an unknown kind, too large, binary or malformed; names the line.
        EncodingWrong: text that is not UTF-8 throughout.
        ParquetBroken: a damaged Parquet file.
        ColumnsWrong: a table that names a column twice.
        TrainExtraMissing: the kind takes a library that is not installed.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise DatasetUnreadable(f"There is no file {path}.")
        if not path.is_file():  # a pipe or device might never end
            raise DatasetUnreadable(f"{path} is not a file.")
        return [_read_file(path)]
    except OSError as problem:
        raise DatasetUnreadable(f"{path} cannot be read: {problem.strerror or problem}.") from problem


def _read_file(path: Path) -> Source:
    suffix = path.suffix.lower()
    kind = "text" if suffix in {".txt", ".md"} else suffix.removeprefix(".").replace("ndjson", "jsonl")
    if suffix == ".parquet":
        rows = _read_parquet(path)
    elif kind in _READERS:
        if path.stat().st_size > MAX_BYTES:
            raise DatasetUnreadable(f"{path} is larger than {MAX_BYTES >> 30} GB; cut it into several files.")
        rows = tuple(_READERS[kind](decode(path.read_bytes(), path.name), path.name))
    else:
        raise DatasetUnreadable(f"{path.name} is of no known kind; .json, .jsonl, .csv, .tsv, .parquet and .txt are.")
    return Source(path.name, kind, rows, split_of(path.stem), sha256_file(path))


def split_of(name: str) -> str:
    """Return train, validation or test where the name of a file or a split says so, else nothing."""
    found = _SPLIT_IN_NAME.fullmatch(name)
    said = found[1].lower() if found else ""
    return _SPLIT_NAMES.get(said, said)


def decode(content: bytes, name: str) -> str:
    """Return text of UTF-8, without a byte order mark.

    Raises:
        EncodingWrong: it is in another encoding, or partly; names the line.
        DatasetUnreadable: it is binary.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise EncodingWrong(f"{name} is UTF-16 or UTF-32; convert it to UTF-8 first.")
    if b"\0" in content:
        raise DatasetUnreadable(f"{name} holds NUL characters: it is no text, or none of UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        other = not content.decode("utf-8", "ignore").isascii()
        raise EncodingWrong(
            f"{name} {'mixes UTF-8 with another encoding' if other else 'is not UTF-8'}: line {line} has the byte "
            f"0x{content[problem.start]:02X}; convert it to UTF-8 throughout.") from problem


def _no_number(_said: str) -> None:
    """Stand in for NaN and the infinities, which JSON does not have: nothing is there."""


def _loads(text: str) -> Any:
    """Return what JSON says; numbers as they are written, for what is made of them is text: 1.10, or 5,000 digits."""
    return json.loads(text, parse_constant=_no_number, parse_int=_Number, parse_float=_Number)


class _Number(str):
    """A number of JSON."""

    __slots__ = ()


def _read_json(text: str, name: str) -> Iterable[Mapping[str, Any]]:
    try:
        found = _loads(text)
    except json.JSONDecodeError as problem:
        if problem.msg == "Extra data" and "\n" in text.strip():  # JSON lines in a file called .json
            return _read_jsonl(text, name)
        raise DatasetUnreadable(f"{name} is not JSON: line {problem.lineno}: {problem.msg}.") from problem
    except (RecursionError, ValueError) as problem:
        raise DatasetUnreadable(f"{name} is not JSON that can be read: {problem}.") from problem
    if isinstance(found, dict):
        lists = [key for key in _LISTS if isinstance(found.get(key), list)]
        if lists:
            found = found[lists[0]]
        elif found and all(isinstance(value, dict) for value in found.values()):  # rows by their ids
            found = [{"id": key, **value} for key, value in found.items()]
        elif columns := _columns(found):
            found = [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
        else:
            found = [found]
    if not isinstance(found, list):
        raise DatasetUnreadable(f"{name} holds no list of rows.")
    return [_as_row(value, f"{name}, row {number}") for number, value in enumerate(found, 1)]


def _columns(found: Mapping[str, Any]) -> list[list[Any]]:
    """Return the values of a document that holds columns, each a list of one value per row; nothing for another."""
    columns = [value for value in found.values() if isinstance(value, list)]
    whole = len(columns) == len(found) and len({len(column) for column in columns}) == 1
    return columns if whole and not any(isinstance(value, dict) for column in columns for value in column) else []


def _read_jsonl(text: str, name: str) -> Iterable[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028, which JSON allows in a text
        if not line.strip():
            continue
        try:
            rows.append(_as_row(_loads(line), f"{name}, line {number}"))
        except (RecursionError, ValueError) as problem:
            reason = problem.msg if isinstance(problem, json.JSONDecodeError) else problem
            raise DatasetUnreadable(f"{name}, line {number} is not JSON: {reason}.") from problem
    return rows


def _as_row(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, str) and not isinstance(value, _Number):
        return {"text": value}
    if not isinstance(value, dict):
        raise DatasetUnreadable(f"{where} is not an object with named columns.")
    return value


def _read_csv(text: str, name: str) -> Iterable[Mapping[str, Any]]:
    return _read_table(text, name, max(",;\t|", key=lambda delimiter: _fields(text, delimiter)))


def _fields(text: str, delimiter: str) -> tuple[bool, int]:
    """Return whether this parts header and first row into as many fields, and into how many the header."""
    rows = (fields for fields in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if fields)
    header = len(next(rows, ()))
    return header > 1 and header == len(next(rows, [""] * header)), header


def _read_tsv(text: str, name: str) -> Iterable[Mapping[str, Any]]:
    return _read_table(text, name, "\t")


def _read_table(text: str, name: str, delimiter: str) -> Iterable[Mapping[str, Any]]:
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Mapping[str, Any]] = []
    header: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                header = [field.strip() for field in fields]
                if twice := {field for field in header if header.count(field) > 1}:
                    raise ColumnsWrong(f"{name} has two columns {min(twice)!r}; rename one.")
            elif len(fields) != len(header):
                raise DatasetUnreadable(f"{name}, line {reader.line_num} has {len(fields)} fields, and the header "
                                        f"{len(header)}.")
            else:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as problem:
        raise DatasetUnreadable(f"{name}, line {reader.line_num} is not CSV: {problem}.") from problem
    return rows


def _read_text(text: str, _name: str) -> Iterable[Mapping[str, Any]]:
    """Return one row per paragraph."""
    parts = re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n").replace("\r", "\n"))
    return [{"text": part.strip("\n")} for part in parts if part.strip()]


_READERS: dict[str, Callable[[str, str], Iterable[Mapping[str, Any]]]] = {
    "json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "tsv": _read_tsv, "text": _read_text}


def _read_parquet(path: Path) -> Rows:
    require(f"Reading {path.name}", "pyarrow")
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return tuple(row for batch in file.iter_batches() for row in batch.to_pylist())
    except (arrow.ArrowException, OSError, EOFError, ValueError) as problem:  # ValueError: texts that are none
        raise ParquetBroken(f"{path.name} is no whole Parquet file: {_first_line(problem)}. Fetch or write it again."
                            ) from problem


def _read_folder(folder: Path) -> list[Source]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _read_saved(folder)
    names = [f"{split}.json" for split in SPLITS]
    if (folder / MANIFEST).is_file() and (folder / names[0]).is_file():  # our own
        files = [folder / name for name in names if (folder / name).exists()]
    else:
        files = sorted(file for part in (folder, folder / "data") if part.is_dir() for file in part.iterdir()
                       if file.name not in _NOT_DATA and not file.name.startswith((".", "README", "LICEN"))
                       and file.suffix.lower() in {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt"})
    if not files:
        raise DatasetUnreadable(f"The folder {folder} holds no JSON, CSV, Parquet or text file.")
    return [_read_file(file) for file in files]


def _read_saved(folder: Path) -> list[Source]:
    """Return the splits of a dataset that was saved with `save_to_disk`."""
    datasets = _library(f"Reading {folder.name}")
    try:
        return _splits_of(datasets.load_from_disk(str(folder)), folder.name, "folder")
    except Exception as problem:  # the library raises its own, Arrow's and the system's
        raise DatasetUnreadable(f"The saved dataset {folder} cannot be read: {_first_line(problem)}.") from problem


def read_hub(name: str, config: str | None = None, split: str | None = None, revision: str | None = None
             ) -> list[Source]:
    """Return the splits of a dataset on the hub, downloaded once into that library's cache.

    The revision is looked up first, so that all files are of one commit; no code of the dataset runs.

    Raises:
        DatasetUnreadable: there is no such dataset, configuration or split, or the hub cannot be reached.
        TrainExtraMissing: the library is not installed.
    """
    datasets = _library(f"Loading {name}")
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name):
        raise DatasetUnreadable(f"{name[:80]!r} is no name of a dataset on the hub; it looks like OWNER/NAME.")
    try:
        info = HfApi().dataset_info(name, revision=revision)
        loaded = datasets.load_dataset(name, config, split=split, revision=info.sha)
        if split is not None:
            loaded = {split: loaded}
        licence = info.card_data.get("license") if info.card_data else None
        return _splits_of(loaded, name, "hub", revision=str(info.sha),
                          licence=", ".join(licence) if isinstance(licence, list) else str(licence or ""))
    except Exception as problem:  # the library raises its own, its HTTP client's and the system's
        reason = {"RepositoryNotFoundError": "there is none of that name, or it is private",
                  "GatedRepoError": "its owner grants access on request"}.get(type(problem).__name__)
        raise DatasetUnreadable(
            f"The dataset {name} cannot be loaded from the hub: {reason or _first_line(problem)}. Check its name and "
            "the connection, or give files with --input-file.") from problem


def _library(purpose: str) -> Any:
    require(purpose, "datasets")
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _splits_of(loaded: Any, name: str, kind: str, **origin: str) -> list[Source]:
    """Return the splits of a loaded dataset, classes by their names instead of their numbers."""
    splits = loaded if hasattr(loaded, "items") else {"": loaded}
    found = []
    for split, part in splits.items():
        names = {column: feature.names for column, feature in part.features.items() if hasattr(feature, "int2str")}
        rows = tuple({column: names[column][value] if column in names and isinstance(value, int) and value >= 0
                      else value for column, value in row.items()} for row in part)
        found.append(Source(name, kind, rows, split_of(str(split)) or str(split), **origin))
    return found


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(problem).__name__)[:300]
