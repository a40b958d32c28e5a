"""A question of EQ-Bench version 2, in the published format, for tests that ask or read it."""

from __future__ import annotations

from typing import Any

EMOTIONS = ("Proud", "Ashamed", "Calm", "Self-conscious")
SCORES = (7.0, 2.0, 0.0, 8.0)  #: of the reference
PROMPT = """
Your task is to predict the likely emotional responses of a character in this dialogue:

Ada: You sewed it yourself?
Ben: It took the whole winter. Do not look at the left sleeve.
[End dialogue]

At the end of this dialogue, Ben would feel...
Proud
Ashamed
Calm
Self-conscious

Give each of these possible emotions a score from 0-10 for the relative intensity that they are likely to be feeling \
each. Then critique your answer by thinking it through step by step. Finally, give your revised scores.

You must output in the following format, including headings (of course, you should give your own scores), with no \
additional commentary:

First pass scores:
Proud: <score>
Ashamed: <score>
Calm: <score>
Self-conscious: <score>

Critique: <your critique here>

Revised scores:
Proud: <revised score>
Ashamed: <revised score>
Calm: <revised score>
Self-conscious: <revised score>

[End of answer]

Remember: zero is a valid score, meaning they are likely not feeling that emotion. You must score at least one emotion \
> 0.
"""
#: the reference, as the published file has it: numbers and texts that spell one
REFERENCE: dict[str, Any] = {
    "emotion1": "Proud", "emotion2": "Ashamed", "emotion3": "Calm", "emotion4": "Self-conscious",
    "emotion1_score": "7", "emotion2_score": 2, "emotion3_score": 0, "emotion4_score": "8"}
#: the value of one question in a file of them
FIELDS: dict[str, Any] = {"prompt": PROMPT, "reference_answer_fullscale": REFERENCE}
