"""Multiple choice by log-likelihood: which of the given answers does a model find the most probable?

No text is generated. The measures are those of EleutherAI's lm-evaluation-harness
(`lm_eval/api/task.py`): `acc` takes the answer with the highest sum of log-probabilities, `acc_norm` the
one with the highest sum per character, so that long answers are not at a disadvantage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from loops.evaluation.fields import read_items, require_text
from state.faults import NightpressError

if TYPE_CHECKING:
    from loops.engine.score import Likelihood  # brings NumPy with it

CONFIDENCE = 0.95
_Z = 1.959963984540054  #: of the normal distribution, two-sided, for that confidence

_QUESTIONS = ("question", "query", "stem", "question_stem", "prompt", "input")
_CHOICES = ("choices", "options")
_ANSWERS = ("answer", "target", "label", "gold", "answerKey", "answer_key", "answer_idx", "answer_index", "correct")
_CONTEXTS = ("context", "passage")
_LETTER = re.compile(r"\(?([A-Za-z])[.)]?")


class ChoicesRefused(NightpressError):
    """The multiple-choice questions cannot be read. Mend the line that the message names."""

    exit_code = 55


@dataclass(frozen=True)
class Choice:
    """One question with its answers.

    Attributes:
        id: unique in its file; the number of its line where it gives none.
        question: the text of it.
        choices: 2 to 26 different answers.
        answer: index of the right one, from 0.
        context: what to read before the question; may be empty.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""


@dataclass(frozen=True)
class Accuracy:
    """The result of a model.

    Attributes:
        acc: share of right answers by the sum of log-probabilities.
        acc_interval: 95 % Wilson interval of `acc`.
        acc_norm: share of right answers by that sum per character of the answer.
        acc_norm_interval: 95 % Wilson interval of `acc_norm`.
        correct: of each question, whether `acc` counts it.
        correct_norm: of each question, whether `acc_norm` counts it.
        probability: of each question, that of the right answer among the given ones, 0 to 1.
        n: questions.
    """

    acc: float
    acc_interval: tuple[float, float]
    acc_norm: float
    acc_norm_interval: tuple[float, float]
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...]
    probability: tuple[float, ...]
    n: int


def _only(fields: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """Return the one field of these names that is there, with its name."""
    there = [name for name in names if fields.get(name) is not None]
    if not there:
        raise ChoicesRefused(f"{where} has no {names[0]!r}.")
    if len(there) > 1:
        raise ChoicesRefused(f"{where} has both {there[0]!r} and {there[1]!r}: leave one of them out.")
    return there[0], fields[there[0]]


def _texts(fields: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the answers and their labels, of which there may be none."""
    name, value = _only(fields, _CHOICES, where)
    labels: Any = ()
    if isinstance(value, dict) and set(value) == {"text", "label"}:  # as ARC has it
        value, labels = value["text"], value["label"]
    elif isinstance(value, dict):  # as MedQA has it
        value, labels = list(value.values()), list(value)
    if not isinstance(value, list) or not 2 <= len(value) <= len(ascii_uppercase):
        raise ChoicesRefused(f"{where} has no list of 2 to {len(ascii_uppercase)} texts in {name!r}.")
    texts = tuple(require_text(text, where, name, ChoicesRefused).strip() for text in value)
    if len(set(texts)) < len(texts):
        raise ChoicesRefused(f"{where} gives the same answer twice in {name!r}.")
    if labels and (not isinstance(labels, list) or len(labels) != len(texts)
                   or len(set(map(str, labels))) < len(texts)):
        raise ChoicesRefused(f"{where} does not label every answer in {name!r} with a label of its own.")
    return texts, tuple(map(str, labels))


def _meanings(value: Any, texts: Sequence[str], labels: Sequence[str]) -> set[int]:
    """Return every answer that value can mean: by index, label, letter or text."""
    if isinstance(value, int) and not isinstance(value, bool):
        named = {index for index, label in enumerate(labels) if label == str(value)}
        return ({value} | named) & set(range(len(texts)))
    if not isinstance(value, str):
        return set()
    value, found = value.strip(), set()
    if value in texts:
        found.add(texts.index(value))
    letter = _LETTER.fullmatch(value)
    if labels:
        names = {value, letter[1] if letter else value}
        found |= {index for index, label in enumerate(labels) if label in names}
    elif letter:
        found.add(ascii_uppercase.index(letter[1].upper()))
    elif value.isascii() and value.isdigit():
        found.add(int(value[:4]))
    return found & set(range(len(texts)))


def _right(fields: Mapping[str, Any], texts: Sequence[str], labels: Sequence[str], where: str) -> int:
    """Return the index of the right answer, on which all fields that name it must agree."""
    given = {name: fields[name] for name in _ANSWERS if fields.get(name) is not None}
    if not given:
        raise ChoicesRefused(f"{where} has no 'answer'.")
    agreed = set(range(len(texts)))
    for name, value in given.items():
        meanings = _meanings(value, texts, labels)
        if not meanings:
            raise ChoicesRefused(f"{where} has the {name} {str(value)[:40]!r}: an index from 0 to {len(texts) - 1}, "
                                 "a letter, or the text of a choice is needed.")
        agreed &= meanings
    if len(agreed) != 1:
        raise ChoicesRefused(f"{where} leaves open which choice is right: {', '.join(map(repr, given))} can mean "
                             f"{'several' if agreed else 'different ones'}.")
    return agreed.pop()


def _parse(fields: Mapping[str, Any], where: str, number: int) -> Choice:
    name, question = _only(fields, _QUESTIONS, where)
    require_text(question, where, name, ChoicesRefused)
    texts, labels = _texts(fields, where)
    context = ""
    if any(fields.get(name) for name in _CONTEXTS):
        name, context = _only({name: fields.get(name) or None for name in _CONTEXTS}, _CONTEXTS, where)
        require_text(context, where, name, ChoicesRefused)
    identity = fields.get("id", number)
    if isinstance(identity, bool) or not isinstance(identity, str | int) or not str(identity).strip():
        raise ChoicesRefused(f"{where} has the id {str(identity)[:40]!r}: a text or a whole number is needed.")
    return Choice(require_text(str(identity), where, "id", ChoicesRefused), question.strip(), texts,
                  _right(fields, texts, labels, where), context.strip())


def read_choices(path: Path) -> tuple[Choice, ...]:
    """Return the questions of a JSONL file in its order.

    A line has `question`, `choices` (2 to 26 texts) and `answer`: an index from 0, a letter, or the text of
    the right choice; `context` and `id` if it likes. Other sets' names are read too: `query`, `stem`, `prompt`,
    `input`; `options`; `target`, `label`, `gold`, `answerKey`, `answer_idx` and the like; `passage`; and choices
    as `{"text": […], "label": […]}` or `{"A": …}`. What can be read in two ways is refused.

    Raises:
        ChoicesRefused: naming the line.
    """
    found = read_items(path, "list of choices", _parse, ChoicesRefused)
    if not found:
        raise ChoicesRefused(f"{path} holds no questions.")
    return found


def prompt_of(choice: Choice) -> str:
    """Return the text before the answer; the answers are not listed in it, as ARC is asked in the harness.

    Plain text: to be tokenized without a chat template, as the harness does by default.
    """
    context = f"{choice.context}\n" if choice.context else ""
    return f"{context}Question: {choice.question}\nAnswer:"


def continuations(choice: Choice) -> tuple[str, ...]:
    """Return the texts to score after the prompt, one per choice, each with a space before it."""
    return tuple(f" {text}" for text in choice.choices)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by the score method of Wilson (1927), within 0 to 1.

    Args:
        right: counted.
        n: of how many, at least 1.
    """
    share, square = right / n, _Z * _Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # rounding must not leave the share itself outside, which for 0 and 1 it could
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _best(values: Sequence[float], right: int) -> bool:
    """Return whether the right one is above all others; a tie is wrong, or a model that knows nothing gains."""
    return all(values[right] > value for index, value in enumerate(values) if index != right)


def summarise(choices: Sequence[Choice], likelihoods: Sequence[Sequence[Likelihood]]) -> Accuracy:
    """Return the result of a model from the likelihoods of all continuations, as `loops.engine.score` gives them.

    The probability of the right answer is the softmax of the sums of log-probabilities over the choices. A
    tie for the highest counts as wrong; the harness takes the first, so it can count one as right.

    Args:
        choices: at least one.
        likelihoods: for each question, one per choice, in order, in nats.

    Raises:
        ValueError: there are no questions, or the likelihoods do not match them or are not numbers.
    """
    if not choices or [len(choice.choices) for choice in choices] != [len(each) for each in likelihoods]:
        raise ValueError(f"{len(choices)} questions and {len(likelihoods)} sets of likelihoods do not match")
    correct, correct_norm, probability = [], [], []
    for choice, each in zip(choices, likelihoods, strict=True):
        sums = [likelihood.total for likelihood in each]
        if not all(map(math.isfinite, sums)):
            raise ValueError(f"a likelihood of question {choice.id} is not a number")
        correct.append(_best(sums, choice.answer))
        correct_norm.append(_best([total / len(text) for total, text in zip(sums, choice.choices, strict=True)],
                                  choice.answer))
        highest = max(sums)
        weights = [math.exp(total - highest) for total in sums]
        probability.append(weights[choice.answer] / math.fsum(weights))
    n = len(choices)
    return Accuracy(sum(correct) / n, wilson(sum(correct), n), sum(correct_norm) / n, wilson(sum(correct_norm), n),
                    tuple(correct), tuple(correct_norm), tuple(probability), n)
