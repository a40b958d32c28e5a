"""Text metrics are those of the libraries that people know, and stand by their word in other scripts."""

from __future__ import annotations

import collections
import random
import re
import string

import numpy as np
import pytest

from loops.answers.overlap import METRICS, bleu_of, bleu_tokens, compare, longest_common, rouge_tokens, squad_tokens

TEXT = """the a an cat, sat. on 3.5 mats - 1-2 dog's &amp; &quot;x&quot; U.S. (b) don't 7,000 A The THE. well-known
           e.g., 50% $3 #1 state-of-the-art x=y 'quoted' [1] {z} ~ `code` \\ / ! ? ; : <skipped> -"""
WORDS = TEXT.split()


def pairs(count: int, longest: int = 12) -> list[tuple[str, str]]:
    chance = random.Random(5)
    joints = (" ", " ", " ", "\n", "  ", "-\n", "")
    return [tuple("".join(word + chance.choice(joints) for word in chance.choices(
        WORDS, k=chance.randint(0, longest))) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def official(prediction: str, truth: str) -> tuple[float, float]:
    """Exact match and F1 as SQuAD's evaluate-v2.0.py computes them."""
    def tokens(text: str) -> list[str]:
        bare = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    said, wanted = tokens(prediction), tokens(truth)
    same = sum((collections.Counter(wanted) & collections.Counter(said)).values())
    if not said or not wanted:
        return float(said == wanted), float(said == wanted)
    if not same:
        return float(said == wanted), 0.0
    precision, recall = same / len(said), same / len(wanted)
    return float(said == wanted), 2 * precision * recall / (precision + recall)


def test_exact_match_and_f1_are_those_of_squad() -> None:
    chance = random.Random(2)
    alike = [(one, one.upper() if chance.random() < 0.5 else f"The {one}!") for one, _ in pairs(100)]
    matches = 0
    for reply, reference in [*pairs(1500, 5), *alike]:
        found = compare(reply, reference).scores
        assert (found["exact_match"], found["f1"]) == pytest.approx(official(reply, reference))
        matches += found["exact_match"] == 1
    assert matches > 50


def test_precision_and_recall_count_words_as_often_as_they_stand() -> None:
    found = compare("cat cat dog", "cat bird cat cat").scores
    assert (found["precision"], found["recall"]) == pytest.approx((2 / 3, 2 / 4))
    assert found["f1"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for reply, reference in pairs(500):
        expected = {name: one.fmeasure for name, one in scorer.score(reference, reply).items()}
        found = compare(reply, reference).scores
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12), (reply, reference)


def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    chance, asked = random.Random(3), pairs(800)
    # replies that share four words in a row with the reference, or the corpus scores next to nothing
    asked += [(f"{one} {two}", " ".join(chance.sample(two.split(), len(two.split())) + two.split()))
              for one, two in pairs(400)]
    found = [compare(*pair) for pair in asked]
    for (reply, reference), one in zip(asked, found, strict=True):
        assert one.scores["bleu"] == pytest.approx(sacrebleu.sentence_bleu(reply, [reference]).score / 100, abs=1e-9)
    replies, references = zip(*asked, strict=True)
    whole = sacrebleu.corpus_bleu(list(replies), [list(references)]).score / 100
    assert whole > 0.2
    statistics = np.asarray([np.sum([one.bleu for one in found], axis=0)], dtype=np.float64)
    assert bleu_of(statistics)[0] == pytest.approx(whole, abs=1e-9)


def test_a_corpus_without_four_words_in_a_row_has_no_bleu_and_a_sentence_has() -> None:
    short = np.asarray([compare("two words", "two words").bleu], dtype=np.float64)
    assert bleu_of(short)[0] == 0
    assert bleu_of(short, sentence=True)[0] == pytest.approx(1)


def test_the_longest_common_subsequence_need_not_stand_together() -> None:
    def table(first: str, second: str) -> int:
        rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for at, one in enumerate(first):
            for place, other in enumerate(second):
                rows[at + 1][place + 1] = (rows[at][place] + 1 if one == other
                                           else max(rows[at][place + 1], rows[at + 1][place]))
        return rows[-1][-1]

    assert longest_common("abcbdab", "bdcaba") == 4
    chance = random.Random(4)
    for _ in range(300):
        first, second = ("".join(chance.choices("abcd", k=chance.randint(0, 90))) for _ in range(2))
        assert longest_common(first, second) == table(first, second)


@pytest.mark.parametrize(("reply", "reference", "expected"), [
    ("", "", {"exact_match": 1, "precision": 1, "recall": 1, "f1": 1}),
    ("The!", "a", {"exact_match": 1, "precision": 1, "recall": 1, "f1": 1}),  # nothing is left of either
    ("", "Yes.", {}), ("Yes.", "", {}), ("   \n", "Yes.", {})])
def test_what_is_empty_matches_only_what_is_empty(reply: str, reference: str, expected: dict[str, float]) -> None:
    found = compare(reply, reference).scores
    assert tuple(found) == METRICS
    assert {name: found[name] for name in expected} == expected
    assert all(value == 0 for name, value in found.items() if name not in expected)


@pytest.mark.parametrize("text", ["Привет, мир и всем добра", "नमस्ते दुनिया और सब लोग", "مرحبا بالعالم كله اليوم",
                                  "我喜欢猫和狗", "ฉันชอบแมว", "naïve Zoë café in São Paulo"])
def test_every_script_counts(text: str) -> None:
    same, none = compare(text, text).scores, compare(text, "quite another thing here").scores
    assert all(value == pytest.approx(1) for value in same.values()), same
    assert all(value == 0 for value in none.values()), none


def test_scripts_without_spaces_are_compared_by_character_and_others_by_word() -> None:
    assert squad_tokens("我喜欢猫。") == rouge_tokens("我喜欢猫。") == ["我", "喜", "欢", "猫"]
    assert bleu_tokens("我喜欢") == ["我", "喜", "欢"]
    assert rouge_tokens("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert compare("我喜欢猫", "我喜欢狗").scores["f1"] == pytest.approx(3 / 4)


def test_accents_are_the_same_however_they_are_written() -> None:
    assert compare("cafe\u0301", "caf\u00e9").scores["exact_match"] == 1
    assert rouge_tokens("cafe\u0301") == rouge_tokens("caf\u00e9") == ["caf\u00e9"]


def test_punctuation_of_other_scripts_does_not_count() -> None:
    assert compare("“Yes” – “no”…", "yes no").scores["exact_match"] == 1
