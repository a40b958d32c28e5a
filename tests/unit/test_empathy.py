"""Empathy is graded by what a reply does: react, interpret, explore; and nobody's input breaks it."""

from __future__ import annotations

import json
import re
import time
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops.evaluation.empathy import CONSTRUCTIONS, SCALES, WEIGHTS, Grades, Scale, attunes, features, grade
from loops.evaluation.language import normalise

PROMPT = ("My mother was diagnosed with dementia last week. I keep smiling in front of her and then I cry in the car.")

#: of each scale, replies that graders would give 0, 1 and 2 by EPITOME's definitions, typed with care and without
GRADED: dict[str, tuple[tuple[str, ...], ...]] = {
    "reaction": (
        ("The clinic opens at nine on weekdays.", "Your mother has an illness of the brain.",
         "What did the doctor say about it?", "thats a disease of old people"),
        ("Hang in there, it will get better.", "You are not alone, take care of yourself.",
         "sending hugs, stay strong"),
        ("I'm so sorry about your mother, my heart breaks for you.", "I am really sad to read about your mother.",
         "im so sorry, it makes me so sad to read this", "I'm sooooo sorry. My heart aches for you.")),
    "interpretation": (
        ("The clinic opens at nine on weekdays.", "Thanks for posting.", "Hugs!", "ok cool"),
        ("I understand how you feel.", "i totally get it", "I hear you, been there."),
        ("You must feel torn, smiling for her while your heart breaks on the inside.",
         "It sounds exhausting to keep smiling for her and then fall apart alone in the car.",
         "u must be so worn out, smiling for her and then breaking down alone in the car")),
    "exploration": (
        ("That is very sad.", "You must be exhausted.", "Dementia is common at that age.", "aww poor you"),
        ("What happened?", "Do you want to talk about it?", "how are u?"),
        ("What is it that goes through your mind when you sit alone in the car after seeing her?",
         "Are you afraid that she will forget who you are?",
         "what do u think abt when ur alone in the car after seeing her?")),
}


def on(scale: str, reply: str) -> float:
    return float(getattr(grade(PROMPT, reply), scale))


@pytest.mark.parametrize("lower", [0, 1])
@pytest.mark.parametrize("scale", SCALES)
def test_every_reply_of_a_higher_grade_is_graded_above_every_one_of_the_next_lower(scale: str, lower: int) -> None:
    below, above = ({reply: on(scale, reply) for reply in GRADED[scale][at]} for at in (lower, lower + 1))
    assert max(below.values()) < min(above.values()), (below, above)


@pytest.mark.parametrize(("careful", "careless"), [
    ("I'm so sorry, you don't deserve this.", "IM SO SORRY, U DONT DESERVE THIS."),
    ("You must be so tired, and that's okay.", "u must be soooo tired, and thats okay."),
    ("I’m here because you’re not alone.", "im here cuz youre not alone.")])
def test_the_same_said_carelessly_is_graded_the_same(careful: str, careless: str) -> None:
    assert grade(PROMPT, careless) == grade(PROMPT, careful)


ADVICE = ("Have you tried a support group for families?", "Why don't you take a holiday from all this?",
          "Have you considered a nursing home for your mother?", "How about hiring a nurse for your mother?",
          "why not ask ur sister to take her?")


@pytest.mark.parametrize("question", [
    *ADVICE, "Could you just put her in a home?", "Who cares?", "Really?", "So what?", "That's hard, right?"])
def test_advice_and_taunts_in_the_form_of_a_question_explore_nothing(question: str) -> None:
    assert on("exploration", question) < 0.5 * min(on("exploration", reply) for reply in GRADED["exploration"][1])


def test_a_question_after_what_one_feels_obliged_to_is_no_advice() -> None:
    assert on("exploration", "Do you feel you have to hide your fear from her when you smile?") > 1.5


@pytest.mark.xfail(strict=True, reason="a like experience, which EPITOME grades 2, hardly counts")
def test_a_like_experience_interprets_more_than_bare_understanding() -> None:
    told = "When my father got dementia I cried in the parking lot every single day for months."
    assert on("interpretation", told) > max(on("interpretation", reply) for reply in GRADED["interpretation"][1])


DISMISSIVE = ("It could be worse, at least she is alive.", "Everyone goes through this, you must get over it.",
              "You are overreacting, it's no big deal that your mother forgets things.",
              "Cheer up, other people have it worse than you.",
              "You just need to stop being so sad about your mother and move on.")


@pytest.mark.parametrize("reply", DISMISSIVE)
def test_who_makes_light_of_things_interprets_nothing(reply: str) -> None:
    assert on("interpretation", reply) < 0.5 * min(on("interpretation", good) for good in GRADED["interpretation"][2])


@pytest.mark.parametrize("reply", [*DISMISSIVE, *ADVICE, "Could you just put her in a home?"])
def test_who_advises_or_makes_light_does_not_attune(reply: str) -> None:
    assert not attunes(reply)


@pytest.mark.parametrize("reply", [*GRADED["reaction"][2], *GRADED["interpretation"][2], *GRADED["exploration"][2]])
def test_who_reacts_interprets_or_explores_attunes(reply: str) -> None:
    assert attunes(reply)


def test_all_three_together_are_graded_above_each_alone() -> None:
    parts = [GRADED[scale][2][0] for scale in SCALES]
    assert grade(PROMPT, " ".join(parts)).score > max(grade(PROMPT, part).score for part in parts) + 0.2


def test_the_score_is_the_sum_over_its_largest() -> None:
    assert Grades(2.0, 2.0, 2.0).score == 1
    assert Grades(1.0, 0.5, 0.0).score == pytest.approx(0.25)


@pytest.mark.parametrize("reply", ["", "  \n", "...", "😢", PROMPT])
def test_without_words_of_ones_own_nothing_is_graded(reply: str) -> None:
    assert grade(PROMPT, reply) == Grades(0.0, 0.0, 0.0)


def test_a_sentence_said_again_counts_once() -> None:
    once = "You must be so tired."
    assert features(PROMPT, f"{once} {once} you must be so tired") == features(PROMPT, once)


def test_a_grade_is_expected_by_proportional_odds() -> None:
    scale = Scale({"sorry": 2.0}, (1.0, 3.0))
    assert scale.expect({"sorry": 1.0}) == pytest.approx(1 / (1 + 2.718281828**-1) + 1 / (1 + 2.718281828**1))
    assert scale.expect({}) < scale.expect({"sorry": 1.0}) < scale.expect({"sorry": 2.0})


# the weights that ship

MADE = {"first_feeling", "infer_feeling", "you_feel", "reflect", "reflect_shared", "share", "share_feeling", "asks",
        "bare_feeling", "asks_you", "asks_feeling", "asks_shared", "asks_long", "asks_generic", "bangs", "length"}
STORED = tomllib.loads(CONSTRUCTIONS.read_text(encoding="utf-8"))
PARTS = {name: STORED[name] for name in ("ADVERB", "PERSON")}
PATTERNS = {name: found for name, found in STORED.items() if name not in PARTS}


def test_every_weight_is_of_a_feature_that_there_is() -> None:
    stored = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    for scale in SCALES:
        assert set(stored[scale]["weights"]) <= MADE | set(PATTERNS), scale


@pytest.mark.parametrize("scale", SCALES)
def test_the_cuts_of_a_scale_ascend(scale: str) -> None:
    first, second = json.loads(WEIGHTS.read_text(encoding="utf-8"))[scale]["cuts"]
    assert first < second


@pytest.mark.parametrize("name", sorted(MADE))
def test_every_made_feature_can_be_found(name: str) -> None:
    said = ("I am so sad! That must be terrible, you sound exhausted. You keep smiling while your mother fades away. "
            "When my own father died I was so lonely. So much grief. How are you? "
            "What frightens you when your mother with dementia smiles at you in the car?")
    assert features(PROMPT, said).get(name, 0) > 0


#: for every construction, sentences of which each of its patterns finds one
SENTENCES: dict[str, str] = {
    "first_person": "I'm really so sad.",
    "sorry_strong": "I'm truly sorry. So sorry.",
    "sorry": "Sorry for your loss. My condolences. I'm sorry.",
    "heart": "My heart aches. That makes me cry. It brought tears. I teared up. I'm crying. I could hug you. "
             "I got goosebumps. I wish I could be there. It hurts me. I'm worried about you.",
    "cheer": "I'm proud of you. So glad to hear it. Rooting for you. I love this. Love this. I care.",
    "comfort": "Hang in there. Stay strong. A hug. Sending love. Here for you. Here if you want. You're not alone. "
               "You've got this. It gets better. Take care. Be gentle with yourself. Praying. Thinking of you. "
               "My thoughts are with you. Good luck. You deserve rest. Wishing you peace. I hope so. Hoping hard. "
               "Fingers crossed. You are strong. You matter. I'm with you. Breathe. Keep going. Thanks for sharing. "
               "Glad you came. Bless you. I'm here.",
    "praise": "Congrats. Well done. Yay. Woooo. Hooray. Bravo. Happy birthday. Cheers to that. Good for you. Go you. "
              "Way to go. Nice work. Good job. Welcome to the club. That's so amazing.",
    "cry_out": "Oh no. | How awful. | What a day! | That sucks. | Poor you. | That's really rough.",
    "endearment": "You can rest, honey. | Sweetheart, rest. | <3 | Rest well xx | 💔",
    "infer": "That must hurt.",
    "infer_you": "You sound sad. You're still grieving.",
    "reason": "No wonder. It makes sense. Of course you are. Anyone would cry. Understandably. Your anger is valid. "
              "You have every right to it. I see why. It's only human. I can only imagine. I hear how sad you are. "
              "That doesn't make you bad. It isn't your fault. You are not weak.",
    "understand": "I totally get it. | Got it. | Understood. | Feel you. | Same. | Been there. | Relatable.",
    "own_past": "When my dog died. I have been sad. My own mother died.",
    "alike": "The same happened to me.",
    "reframe": "It isn't just sad. But also good. At the same time. At once. Both. As if. Like a stone. And then gone. "
               "So now you wait. No matter what. On top of it. Even though it hurts.",
    "advice": "You really should rest. | You shouldn't go. | My advice is rest. | Just call him.",
    "dismiss": "It could be worse.",
    "generic": "What's wrong? Are you okay? How are you? Talk about it? How come? Want to vent? How was it? "
               "How did it go? What do you mean? Care to say?",
    "felt": "What hurts most?",
    "open": "And what then?",
    "tell": "Tell me more. I'd love to hear it. Feel free to write. If you want to talk. I'm listening. All ears. "
            "Say more.",
    "rhetorical": "Sad, huh?",
    "suggestion": "Why don't you go? | Could you just put her in a home?",
}


def compiled(pattern: str) -> re.Pattern[str]:
    for name, alternatives in PARTS.items():
        pattern = pattern.replace(name, alternatives)
    return re.compile(pattern)


def test_every_construction_has_its_sentences() -> None:
    assert set(SENTENCES) == set(PATTERNS)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_every_pattern_of_a_construction_compiles_and_finds_a_sentence(name: str) -> None:
    said = [normalise(sentence) for sentence in SENTENCES[name].split(" | ")]
    assert [pattern for pattern in PATTERNS[name] if not any(map(compiled(pattern).search, said))] == []


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_no_construction_is_found_in_plain_statements(name: str) -> None:
    plain = ("the clinic opens at nine.", "dementia is a disease.", "a bus runs there every ten minutes.")
    assert not [(pattern, text) for pattern in PATTERNS[name] for text in plain if compiled(pattern).search(text)]


# odd input

@settings(deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_grades_stay_between_0_and_2_for_any_texts(prompt: str, reply: str) -> None:
    found = grade(prompt, reply)
    assert all(0 <= getattr(found, scale) <= 2 for scale in SCALES)
    assert 0 <= found.score <= 1


ODD = {"control characters": "\x00\x01\x1b[31mI am sad\x7f\x85", "half a character": "\ud83d I am so sad",
       "right to left": "\u202eI am so sad", "Chinese": "我很难过，真的很抱歉。", "Arabic": "أنا حزين جدا لأجلك",
       "German": "Das tut mir sehr leid.", "combining": "I a\u0301\u0301\u0301m so sad", "one letter": "a"}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_odd_characters_are_graded_without_complaint(text: str) -> None:
    for prompt, reply in ((text, "I am so sorry."), (PROMPT, text)):
        assert 0 <= grade(prompt, reply).score <= 1


HUGE = {"one word": "a", "one sentence": "you must be so sad ", "many sentences": "You must be so sad. ",
        "adverbs": "i'm very ", "marks": ".", "line ends": "\n", "hyphens": "a-", "closing marks": "'\"",
        "Chinese": "难", "emoji": "💔", "gaps": "that is a ", "blanks": " "}


@pytest.mark.parametrize("unit", HUGE.values(), ids=HUGE.keys())
def test_a_megabyte_is_graded_in_a_few_seconds_of_processor_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    grade(PROMPT, "I am sorry.")  # the weights are read once
    started = time.process_time()
    grade(PROMPT, text)
    grade(text, "I am so sorry.")
    assert time.process_time() - started < 7
