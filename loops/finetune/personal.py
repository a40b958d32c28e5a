"""Personal data in text: e-mail addresses, telephone numbers, card numbers.

Found by form. A telephone number counts with its country's `+` or with the usual separators, so that amounts, dates
and plain numbers do not; a card number by its length, its first digit and its check digit (Luhn, ISO/IEC 7812-1).
Names and addresses are not found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EMAIL = re.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_CARD = re.compile(  # in one, in groups of four, or as American Express prints it
    r"(?<![\w.+])(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|3\d{3}([ -])\d{6}\2\d{5})"
    r"(?!\w)(?!\.\d)")
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:"
    r"\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,6}"  # +49 30 1234567
    r"|\(0?\d{2,5}\)[ -]?\d{3,4}[ -]?\d{3,5}"  # (555) 123-4567
    r"|(?:1[ .-])?[2-9]\d{2}([-.])\d{3}\1\d{4}"  # 555-123-4567, 1-800-555-1234
    r"|0\d(?:[ .]\d{2}){4}"  # 06 12 34 56 78
    r"|0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5}"  # 030 1234567
    r")(?![\w-])(?!\.\d)")


@dataclass(frozen=True)
class Found:
    """Personal data at a place in a text: email, phone or card."""

    kind: str
    start: int
    end: int


def find(text: str) -> list[Found]:
    """Return the personal data of a text in order, none within another."""
    found: list[Found] = []
    for kind, pattern in (("email", EMAIL), ("card", _CARD), ("phone", _PHONE)):
        for match in pattern.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if (kind == "card" and not passes_luhn(digits)) or (kind == "phone" and not 7 <= len(digits) <= 15):
                continue
            if all(match.end() <= one.start or one.end <= match.start() for one in found):
                found.append(Found(kind, match.start(), match.end()))
    return sorted(found, key=lambda one: one.start)


def passes_luhn(digits: str) -> bool:
    """Return whether the last of the digits is the check digit of the others."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


def mask(text: str, kinds: tuple[str, ...]) -> str:
    """Return a text with data of these kinds replaced by `[email]`, `[phone]` and `[card]`."""
    for one in reversed(find(text)):
        if one.kind in kinds:
            text = f"{text[:one.start]}[{one.kind}]{text[one.end:]}"
    return text
