"""Errors of datasets."""

from __future__ import annotations

from typing import ClassVar

from state.faults import NightpressError


class DatasetUnreadable(NightpressError):
    """The data cannot be read; the message names the file or the dataset, and the place in it."""

    exit_code: ClassVar[int] = 85


class EncodingWrong(NightpressError):
    """A file is not UTF-8, or mixes encodings; convert it, then run the same command again."""

    exit_code: ClassVar[int] = 86


class ParquetBroken(NightpressError):
    """A Parquet file is incomplete or damaged; fetch or write it again."""

    exit_code: ClassVar[int] = 87


class ColumnsWrong(NightpressError):
    """The columns are of no known format; name the format or say which column is what with --map."""

    exit_code: ClassVar[int] = 88


class TooFewRows(NightpressError):
    """There are too few rows to train, validate and test with; give more data, or remove fewer rows."""

    exit_code: ClassVar[int] = 89


class DatasetRefused(NightpressError):
    """The dataset cannot be prepared so; the message says why."""

    exit_code: ClassVar[int] = 91


class DatasetFaulty(NightpressError):
    """The dataset has faults; the report names them."""

    exit_code: ClassVar[int] = 92
