"""Generate the dialogues that the starter model is trained on, and its held-out text.

The starter model is a small Llama trained from scratch so that every part of the
service can run offline, in seconds, on a model whose behaviour is known. Its world is
the grammar of `grammar.py`: emotional support, naming an emotion, calling a tool,
answering from a context, summarising, small talk. Everything is drawn from a seeded
generator, so the same seed gives the same text, on every machine.

    python -m loops.starter.corpus --dialogues 5 --seed 1
    python -m loops.starter.corpus --held-out
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loops.starter import HELD_OUT
from loops.starter.grammar import (
    CITIES,
    COLORS,
    CURRENCIES,
    DAYS,
    EMOTIONS,
    FOLLOW_UPS,
    JOBS,
    NAMES,
    PEOPLE,
    PETS,
    PLACES,
    PROJECTS,
    REPLIES,
    ROOMS,
    SITUATIONS,
    SUBJECTS,
    TASKS,
    TELLING,
    TELLING_PLAIN,
    TIMES,
    TOOLS,
    TOPICS,
)

#: seeds that the recipe draws from: 0 the tokenizer, 1 and 3 the training, 2 its validation
RECIPE_SEEDS = frozenset({0, 1, 2, 3})
#: the seed and the length of held_out.txt, whose dialogues no part of the recipe was given
HELD_OUT_SEED = 2026
HELD_OUT_DIALOGUES = 400


@dataclass(frozen=True)
class Dialogue:
    """One conversation: alternating user and assistant turns, and what task it is."""

    task: str
    turns: tuple[str, ...]


def _fill(template: str, slots: dict[str, str]) -> str:
    return template.format(**slots)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slots(rng: random.Random) -> dict[str, str]:
    return {
        "person": rng.choice(PEOPLE), "pet": rng.choice(PETS), "time": rng.choice(TIMES),
        "time_next": rng.choice(("tomorrow", "next week", "on Monday", "on Friday")),
        "place": rng.choice(PLACES), "job": rng.choice(JOBS), "subject": rng.choice(SUBJECTS),
        "project": rng.choice(PROJECTS), "city": rng.choice(CITIES),
    }


def _second_person(adjective: str) -> str:
    return adjective.replace("myself", "yourself").replace("my rope", "your rope")


def _user_story(rng: random.Random, emotion: str, plain: float = 0.0) -> tuple[str, str, str]:
    """Return what the user says, the topic as a listener names it, and the adjective.

    With probability plain the user tells what happened and leaves the feeling unsaid.
    """
    slots = _slots(rng)
    told, topic = rng.choice(SITUATIONS[emotion])
    situation, topic = _fill(told, slots), _fill(topic, slots)
    adjective = rng.choice(EMOTIONS[emotion][1])
    telling = rng.choice(TELLING_PLAIN if rng.random() < plain else TELLING)
    text = telling.format(situation=situation, Situation=_upper_first(situation), adj=adjective)
    return text, topic, adjective


def empathy(rng: random.Random) -> Dialogue:
    """A user shares a feeling; the assistant names it, holds it and asks on."""
    emotion = rng.choice(tuple(EMOTIONS))
    text, topic, adjective = _user_story(rng, emotion, plain=0.4)
    parts = REPLIES[EMOTIONS[emotion][0]]
    slots = {"topic": topic, "Topic": _upper_first(topic), "adj": _second_person(adjective)}
    chosen = ["open", "name"]
    chosen += [part for part, chance in (("hold", 0.7), ("picture", 0.35)) if rng.random() < chance]
    chosen.append("next")
    reply = " ".join(_fill(rng.choice(parts[part]), slots) for part in chosen)
    turns = [text, reply]
    if EMOTIONS[emotion][0] == "negative" and rng.random() < 0.2:
        turns += rng.choice(FOLLOW_UPS)
    return Dialogue("empathy", tuple(turns))


def tone_analysis(rng: random.Random) -> Dialogue:
    """Name the emotion, its valence and its strength in a message."""
    emotion = rng.choice(tuple(EMOTIONS))
    text, _, adjective = _user_story(rng, emotion)
    valence, adjectives = EMOTIONS[emotion]
    strength = ("mild", "clear", "strong")[adjectives.index(adjective)]
    question = rng.choice((
        "What emotion is in this message? \"{t}\"", "Name the tone of this message: \"{t}\"",
        "How does the writer feel? \"{t}\"")).format(t=text)
    return Dialogue("tone_analysis", (
        question, f"The main emotion is {emotion}. The tone is {valence} and {strength}."))


def tool_calling(rng: random.Random) -> Dialogue:
    """Turn a request into a JSON tool call."""
    tool, request, names = rng.choice(TOOLS)
    city, city_to = rng.sample(CITIES, 2)
    currency, currency_to = rng.sample(CURRENCIES, 2)
    values = {
        "city": city, "city_to": city_to, "day": rng.choice(DAYS), "topic": rng.choice(TOPICS),
        "task": rng.choice(TASKS), "hour": f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}",
        "name": rng.choice(NAMES), "amount": str(rng.randint(2, 99) * 10),
        "currency": currency, "currency_to": currency_to,
    }
    call = {"tool": tool, "arguments": {name: values[name].removeprefix("on ") for name in names}}
    return Dialogue("tool_calling", (_fill(request, values), json.dumps(call)))


def rag(rng: random.Random) -> Dialogue:
    """Answer a question from the facts of a context."""
    room, color, city = rng.choice(ROOMS), rng.choice(COLORS), rng.choice(CITIES)
    name, year, seats = rng.choice(NAMES), rng.randint(1850, 2020), rng.randint(2, 90) * 10
    hour = rng.randint(6, 11)
    facts = [
        (f"The {room} in {city} opened in {year}.", f"When did the {room} open?",
         f"The {room} opened in {year}."),
        (f"It has a {color} door.", f"What color is the door of the {room}?",
         f"The door of the {room} is {color}."),
        (f"It holds {seats} people.", f"How many people does the {room} hold?",
         f"The {room} holds {seats} people."),
        (f"It is run by {name}.", f"Who runs the {room}?", f"The {room} is run by {name}."),
        (f"It opens at {hour} in the morning.", f"At what time does the {room} open?",
         f"The {room} opens at {hour} in the morning."),
    ]
    head, rest = facts[0], facts[1:]
    rng.shuffle(rest)
    shown = [head, *rest[:rng.randint(1, 4)]]
    _, question, answer = rng.choice(shown)
    context = " ".join(fact for fact, _, _ in shown)
    return Dialogue("rag", (f"Context: {context}\nQuestion: {question}", answer))


def summarization(rng: random.Random) -> Dialogue:
    """Summarise a short report in one sentence."""
    name, city, topic = rng.choice(NAMES), rng.choice(CITIES), rng.choice(TOPICS)
    room, day, people = rng.choice(ROOMS), rng.choice(DAYS[2:]), rng.randint(2, 90) * 10
    middle = rng.sample((
        f"About {people} people came.", "The talk lasted two hours.",
        "There was tea and cake afterwards.", "Many people asked questions.",
        "The doors opened early because of the rain."), rng.randint(2, 4))
    report = (f"{_upper_first(day)}, {name} gave a talk about {topic} at the {room} in {city}. "
              + " ".join(middle))
    return Dialogue("summarization", (
        f"Summarize this in one sentence: {report}",
        f"{name} gave a talk about {topic} at the {room} in {city} {day}."))


def small_talk(rng: random.Random) -> Dialogue:
    """A remark without a feeling: the assistant asks instead of guessing."""
    name, city, topic = rng.choice(NAMES), rng.choice(CITIES), rng.choice(TOPICS)
    remark = rng.choice((
        f"I read about {topic} {rng.choice(TIMES)}.", f"{name} lives in {city}.",
        f"The {rng.choice(ROOMS)} in {city} is {rng.choice(COLORS)}.",
        f"I had soup for dinner {rng.choice(TIMES)}.", f"It rained in {city} {rng.choice(TIMES)}.",
        f"My {rng.choice(PEOPLE)} works as a {rng.choice(JOBS)} in {city}.",
        f"I bought a {rng.choice(COLORS)} coat {rng.choice(TIMES)}."))
    reply = rng.choice((
        "Thank you for telling me. How do you feel about it?",
        "I see. What does that mean to you?",
        "Tell me more. How was it for you?"))
    return Dialogue("small_talk", (remark, reply))


Mix = tuple[tuple[Callable[[random.Random], Dialogue], float], ...]

TASKS_MIX: Mix = ((empathy, 0.52), (tone_analysis, 0.13), (tool_calling, 0.12), (rag, 0.12),
                  (summarization, 0.07), (small_talk, 0.04))


def mix_with_rag(share: float) -> Mix:
    """Return the mix with this share of `rag` dialogues, the other tasks scaled to fit.

    Copying a name or a number out of a context is what the model is worst at; more of it
    in the mix is the plain way to train it more.

    Raises:
        ValueError: the share is not between 0 and 1, both excluded.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of rag dialogues lies between 0 and 1, not at {share:g}")
    others = sum(weight for task, weight in TASKS_MIX if task is not rag)
    return tuple((task, share if task is rag else weight * (1 - share) / others)
                 for task, weight in TASKS_MIX)


def dialogue(rng: random.Random, mix: Mix = TASKS_MIX) -> Dialogue:
    """Draw one dialogue of a task, tasks in their share of the mix."""
    tasks, weights = zip(*mix, strict=True)
    drawn: Dialogue = rng.choices(tasks, weights)[0](rng)
    return drawn


def render(turns: tuple[str, ...]) -> str:
    """Lay turns out in the starter model's chat format, without the leading <s>."""
    text = ""
    for index, turn in enumerate(turns):
        text += ("<|user|>" if index % 2 == 0 else "<|assistant|>") + "\n" + turn + "</s>\n"
    return text


def held_out_text() -> str:
    """Return what `held_out.txt` holds: rendered dialogues, end to end, each after its <s>.

    <s>, role markers and </s> stand in it literally, so it is to be tokenized with special
    tokens parsed. The <s> matter: training put one before every dialogue, and without them
    perplexity rises from 1.5 to 2.0 on the surprise that a new one begins. At windows of
    512 tokens of which the second half is scored, about 13,000 tokens count. The seed is
    not one of the recipe's, but the grammar is the same: this measures how a level keeps
    what the model learned, not what it knows of the world.
    """
    rng = random.Random(HELD_OUT_SEED)
    return "".join("<s>" + render(dialogue(rng).turns) for _ in range(HELD_OUT_DIALOGUES))


def main(argv: Sequence[str] | None = None) -> int:
    """Print dialogues as JSON lines, or write the held-out text; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loops.starter.corpus",
                                     description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=5, help="how many to print (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed, the same text (default: 1)")
    parser.add_argument("--held-out", type=Path, nargs="?", const=HELD_OUT, metavar="FILE",
                        help=f"write the evaluation text instead (default FILE: {HELD_OUT.name} "
                             "of this package)")
    args = parser.parse_args(argv)
    if args.held_out is not None:
        args.held_out.write_bytes(held_out_text().encode())
        print(f"wrote {HELD_OUT_DIALOGUES} dialogues to {args.held_out}", file=sys.stderr)
        return 0
    rng = random.Random(args.seed)
    for _ in range(args.dialogues):
        drawn = dialogue(rng)
        print(json.dumps({"task": drawn.task, "turns": drawn.turns}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
