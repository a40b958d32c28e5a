"""The parity gate: two forms of one model must say the same, token by token.

A model goes through several hands: an adapter is merged, the weights are converted. Each form reads the same fixed
text; its tokens must be identical, and so must be, within bounds, the logits of every token. The first stage whose
forms differ is named, and nothing goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loops.engine.logits import Floats, kl_divergence, log_softmax
from state.faults import NightpressError

#: Read by every form; the logits of its first `TOKENS` tokens are compared.
PROSE = (
    "The old lighthouse stood at the end of the harbour, and every evening its keeper climbed the narrow stairs to "
    "light the lamp. Ships had passed here for two hundred years, some of them carrying grain and timber, others "
    "letters from people who would not see each other again. In winter the storms were so loud that he could not hear "
    "his own voice; in summer he sat outside, repaired his nets and talked to anyone who came by. \"You must be "
    "lonely,\" a visitor once said to him. He thought about it for a while. \"No,\" he answered, \"I have the sea, a "
    "good book and a warm stove. What else would I need?\" The visitor laughed, but on the way home she kept thinking "
    "of the question. How much does a person need? She had 3 rooms, 2 jobs and a garden of 40 square metres, and she "
    "was tired. The next spring she sold the car, learned to mend things with her own hands, and wrote a long letter "
    "to the keeper of the lighthouse. He read it twice and put it on the shelf beside the clock.")
#: Tokenized by every form, each for what tokenizers get wrong.
SAMPLES: Mapping[str, str] = {
    "prose": PROSE,
    "leading space": " a word after a space",
    "whitespace": "two  spaces,\ttab,\n\nempty line\n    four spaces of indent ",
    "digits": "In 1984 it was 3.14159, 1,000,000 and 007; call 555-0199.",
    "code": "def f(x: int) -> str:\n    return f\"{x!r}\" if x >= 0 else '\\\\n'  # done\n",
    "accents": "Zoë's naïve café in São Paulo, Łódź and Ångström; “quotes” – and … dots",
    "scripts": "Привет, мир! 你好，世界。 こんにちは مرحبا नमस्ते",
    "emoji": "Good job 👍🏽 from the 👩‍👩‍👧 family 🏳️‍🌈!",
    "punctuation": "What?! No... (yes) [maybe] {never} <tag> a/b\\c @you #me $5 50% & * ~ ^ | _",
}
QUESTION = "I had a long day. Can you say something kind?"
TOKENS = 256  #: compared, at most
SLICE_ROWS = 32


class TokenizerMismatch(NightpressError):
    """The tokenizer does not fit the model, or came out of the conversion changed."""

    exit_code = 97


class ParityFailed(NightpressError):
    """Two forms of the model do not say the same; nothing was written."""

    exit_code = 101


@dataclass(frozen=True)
class Bounds:
    """How far two forms may be apart, in nats.

    Attributes:
        mean_kl: mean over the tokens of the KL divergence from the first form.
        max_kl: the largest at a single token.
        lead: where the first form's most probable token leads the next by more than this, it must be the other's too.
    """

    mean_kl: float
    max_kl: float
    lead: float


#: F16 and F32 against PyTorch in 32 bits: the starter and its two sisters (`loops.starter.train`) come to means of
#: 1e-7 to 1e-6 and maxima of 1e-6 to 2e-5. Their Q8_0, which is to fail, has means from 3e-4 and maxima from 3e-3.
EXACT = Bounds(mean_kl=5e-5, max_kl=2e-3, lead=0.1)
#: BF16 keeps 8 bits of each number: 1e-5 to 3e-5 and 2e-4 to 3e-4 were measured. Merged weights are rounded to it too.
ROUNDED = Bounds(mean_kl=2e-4, max_kl=5e-3, lead=0.3)


#: however much rounding changes a model, no more than this is put down to it
MOST = Bounds(mean_kl=1e-2, max_kl=0.2, lead=1.0)


def bounds_of(weight_type: str, rounding: Sequence[float] = ()) -> Bounds:
    """Return the bounds for weights of a type, by ggml's name or PyTorch's.

    The engine rounds what flows into a product with BF16 weights to BF16 too. What that does to a model grows with its
    depth, so a model that PyTorch itself makes differ more when it rounds has wider bounds: half as much, up to `MOST`.
    PyTorch rounds results too: of random weights in 16 layers of 512 it came to 1.4e-2 (largest 0.15), and the engine
    to 2e-3 (8e-3).

    Args:
        weight_type: of the second form.
        rounding: mean and largest KL divergence, and largest difference of a log-probability, of the first form with
            products in BF16, see `reading.read_with_torch`; empty where that is not known.
    """
    if weight_type.upper().replace("BFLOAT16", "BF16") != "BF16":
        return EXACT
    if not rounding:
        return ROUNDED
    return Bounds(*(min(most, max(least, found)) for least, found, most in zip(
        (ROUNDED.mean_kl, ROUNDED.max_kl, ROUNDED.lead), (rounding[0] / 2, rounding[1] / 2, rounding[2]),
        (MOST.mean_kl, MOST.max_kl, MOST.lead), strict=True)))


@dataclass(frozen=True)
class Reading:
    """What a form of the model makes of the fixed text.

    Attributes:
        name: of the form, for people: `the original`, `the GGUF`.
        tokens: ids of each of `SAMPLES` with the special tokens that the tokenizer adds by itself.
        ids: of the text whose logits were computed.
        special: ids by name: `bos`, `eos`; -1 for none.
        control: text of the tokens that only control, by id.
        template: the chat template; '' for none.
        chat: ids of `QUESTION` in the chat template; empty where it does not work.
        weight_type: of the weights, as stored.
        rounding: what products in BF16 do to the model, see `bounds_of`; empty where it was not asked.
    """

    name: str
    tokens: Mapping[str, Sequence[int]]
    ids: Sequence[int]
    special: Mapping[str, int]
    control: Mapping[int, str]
    template: str
    chat: Sequence[int]
    weight_type: str
    rounding: Sequence[float] = ()


@dataclass(frozen=True)
class Agreement:
    """How two forms agree.

    Attributes:
        stage: that leads from the first to the second.
        tokens: compared.
        mean_kl: in nats per token.
        max_kl: at the token where it is largest.
        worst: the place of that token.
        max_difference: of two log-probabilities of any token that the first form gives 0.1 % or more.
        same_top: share of places with the same most probable token.
        notes: what a person should know, though it stops nothing.
    """

    stage: str
    tokens: int
    mean_kl: float
    max_kl: float
    worst: int
    max_difference: float
    same_top: float
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {**self.__dict__, "notes": list(self.notes)}


def check_tokens(stage: str, first: Reading, second: Reading) -> tuple[str, ...]:
    """Compare tokenizers, special tokens and chat templates of two forms; return notes.

    Raises:
        TokenizerMismatch: naming the stage and the first difference.
    """
    for name, expected in first.tokens.items():
        found = list(second.tokens[name])
        if found != list(expected):
            at = next((place for place, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other),
                      min(len(expected), len(found)))
            raise TokenizerMismatch(
                f"Stage {stage}: {second.name} splits the sample {name!r} otherwise than {first.name}, from token {at} "
                f"on: {found[at:at + 4]} instead of {list(expected)[at:at + 4]}.")
    for name, token in first.special.items():
        if token not in (-1, second.special[name]):  # for a token that the one has not, the other has a default
            raise TokenizerMismatch(f"Stage {stage}: the {name} token of {second.name} is {second.special[name]}, and "
                                    f"that of {first.name} is {token}.")
    lost = [text for token, text in first.control.items() if token not in second.control]
    if lost:
        raise TokenizerMismatch(f"Stage {stage}: {', '.join(map(repr, lost[:5]))} "
                                f"{'is a control token' if len(lost) == 1 else 'are control tokens'} of {first.name}, "
                                f"and plain text in {second.name}; list them in added_tokens_decoder of "
                                "tokenizer_config.json.")
    if first.template != second.template:
        raise TokenizerMismatch(f"Stage {stage}: the chat template of {second.name} is not that of {first.name}.")
    notes = []
    if not first.template:
        notes.append("The model has no chat template; conversations are read as plain text.")
    elif first.chat and list(first.chat) != list(second.chat):
        notes.append("A question in the chat template comes out with other tokens here than in transformers.")
    return tuple(notes)


def compare(stage: str, first: Floats, second: Floats, bounds: Bounds) -> Agreement:
    """Compare the logits of two forms for the same tokens.

    Args:
        stage: that leads from the first to the second.
        first: shape (tokens, vocabulary).
        second: of the same shape.
        bounds: that must hold.

    Raises:
        ParityFailed: naming the stage, with what differs and by how much.
    """
    if first.shape != second.shape:
        raise ParityFailed(f"Stage {stage}: the vocabulary has {second.shape[1]:,} tokens instead of "
                           f"{first.shape[1]:,}.")
    divergence, tops, turned, difference = [], 0, -1, 0.0
    for start in range(0, len(first), SLICE_ROWS):
        one, other = (log_softmax(np.array(logits[start:start + SLICE_ROWS], dtype=np.float32))
                      for logits in (first, second))
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise ParityFailed(f"Stage {stage}: a form of the model computes values that are not finite.")
        divergence.append(kl_divergence(one, other))
        best = one.argmax(axis=1)
        same = best == other.argmax(axis=1)
        two = np.partition(one, -2, axis=1)[:, -2:]
        clear = (two[:, 1] - two[:, 0] > bounds.lead) & ~same
        if turned < 0 and clear.any():
            turned = start + int(clear.argmax())
        tops += int(same.sum())
        likely = one > math.log(1e-3)
        difference = max(difference, float(np.abs(one - other)[likely].max()))
    kl = np.maximum(np.concatenate(divergence), 0.0)  # rounding takes it below zero
    found = Agreement(stage, len(kl), float(kl.mean()), float(kl.max()), int(kl.argmax()), difference, tops / len(kl))
    if turned >= 0:
        raise ParityFailed(f"Stage {stage} changed the model: after token {turned} of the fixed text another one is "
                           f"the most probable. {_figures(found, bounds)}")
    if found.mean_kl > bounds.mean_kl or found.max_kl > bounds.max_kl:
        raise ParityFailed(f"Stage {stage} changed the model. {_figures(found, bounds)}")
    return found


def _figures(found: Agreement, bounds: Bounds) -> str:
    return (f"KL divergence per token: mean {found.mean_kl:.2g} ({bounds.mean_kl:g} allowed), largest "
            f"{found.max_kl:.2g} at token {found.worst} ({bounds.max_kl:g} allowed).")
