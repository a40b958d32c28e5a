"""What is wrong with a dataset: errors that spoil training or its figures, and warnings to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibration_data.checks import guess_language
from loops.finetune import near, personal
from loops.finetune.cleaning import Cleaning, Statistics, describe, special_pattern
from loops.finetune.records import Row

ERROR, WARNING = "error", "warning"
UNKNOWN = "unknown"  #: the language of a row that is too short to tell, or of none that is known
SHOWN = 5  #: ids that a finding names
UNEVEN = 10  #: times that the largest class may be as large as the smallest
#: what is looked at, in the order of the report
CHECKS = {"rows": "rows in every split", "files": "files as prepared", "nulls": "nothing missing",
          "instruction_format": "turns in order", "special_tokens": "no control tokens in texts",
          "duplicates": "no duplicates", "near_duplicates": "no near-duplicates", "lengths": "lengths",
          "language": "one language", "labels": "classes", "personal_data": "no personal data",
          "leakage": "no leakage between splits"}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        check: one of CHECKS.
        level: ERROR or WARNING.
        message: a sentence.
        count: of rows it is about.
        rows: the ids of the first of them.
    """

    check: str
    level: str
    message: str
    count: int = 0
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found, and what the splits hold; languages and labels are of all splits together."""

    splits: Mapping[str, Statistics]
    languages: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that must be mended."""
        return tuple(one for one in self.findings if one.level == ERROR)

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON document."""
        return {"usable": not self.errors, "splits": {name: asdict(found) for name, found in self.splits.items()},
                "languages": dict(self.languages), "checks": list(CHECKS),
                "findings": [asdict(one) for one in self.findings]}

    def lines(self) -> Iterator[str]:
        """Yield the report for people: the splits, then each check with what it found."""
        for name, found in self.splits.items():
            yield f"{name or 'all rows'}: {found}"
        yield ""
        for check, title in CHECKS.items():
            found_here = [one for one in self.findings if one.check == check]
            level = "ok" if not found_here else ERROR if any(one.level == ERROR for one in found_here) else WARNING
            yield f"{level:8}{title}"
            for one in found_here:
                more = f" and {one.count - len(one.rows):,} more" if one.count > len(one.rows) > 0 else ""
                yield f"        {one.message}" + (f" {', '.join(one.rows)}{more}" if one.rows else "")


def validate(splits: Mapping[str, Sequence[Row]], how: Cleaning) -> Report:
    """Return what is wrong with the splits of a dataset.

    Args:
        splits: by name; one with an empty name is a dataset that is not split.
        how: its tokenizer, bounds of length and similarity hold here too.

    Raises:
        TrainExtraMissing: there are many rows to compare, and the library for that is not installed.
    """
    rows = [row for found in splits.values() for row in found]
    languages = [guess_language(row.text) for row in rows]
    findings = [*_rows(splits), *_nulls(rows), *_instruction_format(rows), *_special_tokens(rows, how),
                *_lengths(rows, how), *_language(rows, languages), *_labels(splits), *_personal_data(rows),
                *_alike(splits, how)]
    return Report({name: describe(found, how.tokenizer) for name, found in splits.items()},
                  dict(Counter(code or UNKNOWN for code in languages).most_common()),
                  tuple(sorted(findings, key=lambda one: list(CHECKS).index(one.check))))


def _finding(check: str, level: str, message: str, rows: Iterable[Row]) -> Iterator[Finding]:
    found = list(dict.fromkeys(row.id for row in rows))
    if found:
        yield Finding(check, level, f"{len(found):,} row{'' if len(found) == 1 else 's'} {message}:", len(found),
                      tuple(found[:SHOWN]))


def _rows(splits: Mapping[str, Sequence[Row]]) -> Iterator[Finding]:
    for name, found in splits.items():
        if len(found) < 2:
            told = "one row" if found else "no rows"
            yield Finding("rows", ERROR, f"{name or 'The dataset'} has {told}.", len(found))
    missing = [name for name in ("train", "validation", "test") if name not in splits]
    if any(splits) and missing:
        yield Finding("rows", WARNING, f"There is no split called {' or '.join(missing)}.")


def _nulls(rows: Sequence[Row]) -> Iterator[Finding]:
    yield from _finding("nulls", ERROR, "have nothing where a text should be", (
        row for row in rows if not row.turns or not all(turn.text.strip() for turn in row.turns)))


def _instruction_format(rows: Sequence[Row]) -> Iterator[Finding]:
    yield from _finding("instruction_format", ERROR, "are not turns of user and assistant in order, ending with the "
                        "assistant's", (row for row in rows if row.turns and not row.in_order))
    yield from _finding("instruction_format", WARNING, "answer with the question itself", (
        row for row in rows if len(row.turns) > 1 and row.answer.strip()
        and row.answer.split() == row.turns[-2].text.split()))


def _special_tokens(rows: Sequence[Row], how: Cleaning) -> Iterator[Finding]:
    pattern = special_pattern(how.tokenizer)
    yield from _finding("special_tokens", WARNING, "hold control tokens as text, which could forge turns; the step "
                        "special_tokens removes them", (row for row in rows if pattern.search(row.text)))


def _lengths(rows: Sequence[Row], how: Cleaning) -> Iterator[Finding]:
    lengths = how.tokenizer.count([row.text for row in rows])
    measured = list(zip(rows, lengths, strict=True))
    yield from _finding("lengths", WARNING, f"are longer than {how.max_tokens:,} {how.tokenizer.unit}", (
        row for row, length in measured if length > how.max_tokens))
    yield from _finding("lengths", WARNING, f"are shorter than {how.min_tokens:,} {how.tokenizer.unit}", (
        row for row, length in measured if 0 < length < how.min_tokens))


def _language(rows: Sequence[Row], languages: Sequence[str]) -> Iterator[Finding]:
    counts = Counter(code for code in languages if code).most_common()
    if len(counts) > 1:
        others = ", ".join(f"{code} {count:,}" for code, count in counts[1:])
        yield from _finding("language", WARNING, f"are not in the language of most, {counts[0][0]}, but in another "
                            f"({others})", (row for row, code in zip(rows, languages, strict=True)
                                            if code not in ("", counts[0][0])))


def _labels(splits: Mapping[str, Sequence[Row]]) -> Iterator[Finding]:
    counts = Counter(row.label for rows in splits.values() for row in rows if row.label)
    if not counts:
        return
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if many > UNEVEN * few:
        yield Finding("labels", WARNING, f"The class {most[:40]!r} has {many:,} rows and {least[:40]!r} {few:,}; the "
                      "step balance evens them.")
    yield from _finding("labels", WARNING, "have no class, though others do", (
        row for rows in splits.values() for row in rows if not row.label))
    trained = {row.label for row in splits.get("train", ())}
    for name in ("validation", "test") if trained else ():
        if unseen := sorted({row.label for row in splits.get(name, ())} - trained - {""}):
            yield Finding("labels", WARNING, f"{name} has classes that train has not: "
                          f"{', '.join(label[:40] for label in unseen[:SHOWN])}.")


def _personal_data(rows: Sequence[Row]) -> Iterator[Finding]:
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        for kind in {one.kind for one in personal.find(row.text)}:
            by_kind.setdefault(kind, []).append(row)
    titles = {"email": "e-mail addresses", "phone": "telephone numbers", "card": "card numbers"}
    for kind, title in titles.items():
        yield from _finding("personal_data", WARNING, f"hold {title}; the step personal_data masks them",
                            by_kind.get(kind, ()))


def _alike(splits: Mapping[str, Sequence[Row]], how: Cleaning) -> Iterator[Finding]:
    """Yield what repeats within a split, and what one split gives away of another."""
    rows = [row for found in splits.values() for row in found]
    home = [name for name, found in splits.items() for _ in found]
    exact = near.exact_duplicates(rows)
    twice = {second for second, first in exact if home[first] == home[second]}
    leaked = {second for second, first in exact if home[first] != home[second]}
    alike: set[int] = set()
    for pair in near.pairs([row.text for row in rows], how.near, lambda first, second: second in (
            alike if home[first] == home[second] else leaked), home):
        (alike if home[pair.first] == home[pair.second] else leaked).add(pair.second)
    yield from _finding("duplicates", WARNING, "repeat another of their split word for word", (
        rows[number] for number in sorted(twice)))
    yield from _finding("near_duplicates", WARNING, f"are near-duplicates (similarity {how.near:g} or more) of another "
                        "of their split", (rows[number] for number in sorted(alike - twice)))
    yield from _finding("leakage", ERROR, f"are near-duplicates (similarity {how.near:g} or more) of rows of another "
                        "split", (rows[number] for number in sorted(leaked)))
    yield from _finding("leakage", WARNING, f"give an answer of {near.LONG_ANSWER} words or more that another split "
                        "has too", (rows[second] for second, first in near.same_answers(rows)
                                    if home[first] != home[second] and second not in leaked))
