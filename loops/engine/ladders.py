"""Named ladders of levels and what is known of each level, without loading the engine.

Two tables stand behind both. `PUBLISHED` is llama.cpp's own (tools/perplexity/README.md, "LLaMA 3 8b Scoreboard",
revision f364eb6f): Llama-3-8B on wikitext-2. `STARTER` was measured on 21 November 2026 with

    python benchmarks/levels.py

Both give the mean KL divergence from the unquantized model as a share of that model's own loss (the logarithm of its
perplexity), for in nats the divergences of a model that is rarely surprised are small whatever is done to it. As
shares the two models mostly agree within a factor of two to three; the large one, trained longer, has more to lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

#: the ladder of the original tool, from large to small
ORIGINAL_LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_L", "Q2_K")

#: every quantized level that the installed llama.cpp writes, in the order of bits per weight of the starter
FULL = (
    "Q8_0", "MXFP4_MOE", "Q6_K", "Q5_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_M", "Q4_K_S", "IQ4_NL", "Q4_0",
    "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S",
    "Q2_0", "IQ2_XS", "TQ2_0", "IQ2_XXS", "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0")

IQ = tuple(name for name in FULL if name.startswith("IQ"))

#: for models that were trained with weights of so few values; of any other model they leave nothing
TRAINED_FOR = ("Q2_0", "TQ2_0", "TQ1_0", "Q1_0")

#: Llama-3-8B: size in GiB and KL divergence in nats per token; with an importance matrix only where there is no other
_LLAMA_3_8B = {
    "Q8_0": (7.96, 0.001355), "Q6_K": (6.14, 0.005452), "Q5_K_M": (5.33, 0.010762), "Q5_K_S": (5.21, 0.016595),
    "Q5_1": (5.65, 0.018045), "Q5_0": (5.21, 0.022239), "Q4_K_M": (4.58, 0.031273), "IQ4_NL": (4.35, 0.035742),
    "IQ4_XS": (4.14, 0.036334), "Q4_K_S": (4.37, 0.043136), "Q4_1": (4.78, 0.071683), "Q4_0": (4.34, 0.071940),
    "Q3_K_L": (4.03, 0.087176), "Q3_K_M": (3.74, 0.101913), "IQ3_M": (3.53, 0.102534), "IQ3_S": (3.42, 0.111278),
    "IQ3_XS": (3.28, 0.138693), "IQ3_XXS": (3.05, 0.183625), "Q3_K_S": (3.41, 0.228217), "IQ2_M": (2.74, 0.325989),
    "Q2_K_S": (2.96, 0.403360), "IQ2_S": (2.56, 0.439197), "Q2_K": (2.96, 0.445132), "IQ2_XS": (2.43, 0.546290),
    "IQ2_XXS": (2.24, 0.812022), "IQ1_M": (2.01, 1.393084), "IQ1_S": (1.88, 2.254554)}
#: the same with its matrix of 10 million tokens, of the levels that were measured both ways
_LLAMA_3_8B_MATRIX = {"Q4_K_M": 0.028152, "Q4_K_S": 0.031951, "Q3_K_L": 0.073077, "Q3_K_M": 0.084358,
                      "Q3_K_S": 0.199821, "Q2_K": 0.332223}
_LLAMA_3_8B_LOSS = math.log(6.231636)  # its F16 row, less the difference of that row

PUBLISHED: Mapping[str, float] = {name: kld / _LLAMA_3_8B_LOSS for name, (_, kld) in _LLAMA_3_8B.items()}

#: the starter: bits per weight and KL divergence in nats per token, all with the same importance matrix
_STARTER = {
    "Q8_0": (8.594, 0.00010), "MXFP4_MOE": (8.594, 0.00010), "Q6_K": (6.658, 0.00054), "Q5_1": (6.158, 0.00103),
    "Q5_K_M": (5.852, 0.00111), "Q5_0": (5.728, 0.00137), "Q5_K_S": (5.714, 0.00138), "Q4_1": (5.270, 0.00336),
    "Q4_K_M": (5.093, 0.00306), "Q4_K_S": (4.872, 0.00330), "Q4_0": (4.840, 0.00489), "IQ4_NL": (4.826, 0.00517),
    "IQ4_XS": (4.604, 0.00533), "Q3_K_L": (4.569, 0.00969), "Q3_K_M": (4.245, 0.01047), "IQ3_M": (4.029, 0.01636),
    "Q3_K_S": (3.882, 0.02064), "IQ3_S": (3.882, 0.02620), "IQ3_XS": (3.715, 0.01388), "Q2_K": (3.431, 0.08674),
    "IQ3_XXS": (3.403, 0.02147), "Q2_K_S": (3.212, 0.12425), "IQ2_M": (3.108, 0.02646), "IQ2_S": (2.921, 0.03363),
    "Q2_0": (2.827, 1.12906), "IQ2_XS": (2.785, 0.05529), "TQ2_0": (2.660, 2.10148), "IQ2_XXS": (2.579, 0.08900),
    "IQ1_M": (2.345, 0.13930), "TQ1_0": (2.327, 2.10148), "IQ1_S": (2.204, 0.18066), "Q1_0": (1.827, 2.24194)}
_STARTER_LOSS = 0.4124

STARTER: Mapping[str, float] = {name: kld / _STARTER_LOSS for name, (_, kld) in _STARTER.items()}

#: what to expect of a model that nobody measured: the worse of both tables. MXFP4_MOE is Q8_0 in a model without
#: experts, such as the starter, and what it does to experts is in neither table.
EXPECTED: Mapping[str, float] = {
    name: max(PUBLISHED.get(name, 0.0), share) for name, share in STARTER.items() if name != "MXFP4_MOE"}


def knees(points: Mapping[str, tuple[float, float]], slack: float = 0.0) -> tuple[str, ...]:
    """Return the levels that no other dominates, from large to small.

    One dominates another where it is at most as large and at most as far from the original, and better in one of the
    two. Of levels that are the same in both, the first given stays.

    Args:
        points: size and KL divergence by level, in any units.
        slack: share of a divergence that counts as no difference: to be worth its size, a larger level has to be
            better by more than that.
    """
    best, found = math.inf, []
    for name in sorted(points, key=lambda one: points[one]):
        if points[name][1] < best * (1 - slack):
            best = points[name][1]
            found.append(name)
    return tuple(reversed(found))


#: what counts as no difference between two divergences of the starter: about their standard error
SLACK = 0.1

#: The levels that are worth their bytes, each with an importance matrix where it was measured with one. What is
#: dominated in one table and not in the other stays: leaving out a good level costs more than trying one too many.
KNEES = tuple(name for name in FULL if name not in TRAINED_FOR and name in {
    *knees({name: (size, _LLAMA_3_8B_MATRIX.get(name, kld)) for name, (size, kld) in _LLAMA_3_8B.items()}),
    *knees(_STARTER, SLACK)})

LADDERS: Mapping[str, tuple[str, ...]] = {"original": ORIGINAL_LADDER, "full": FULL, "iq": IQ, "knees": KNEES}


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return names with those of ladders, in any case, replaced by their levels; all others stay as they are."""
    return tuple(level for name in names for level in LADDERS.get(name.strip().lower(), (name,)))


_USES = (
    (("Q8_0",), "as good as the original at half its size"),
    (("MXFP4_MOE",), "only for experts of models made for it; otherwise the same as Q8_0"),
    (("Q6_K",), "hardly a difference, also in code"),
    (("Q5_K_M", "Q5_K_S"), "little loss: code, commands, chat"),
    (("Q5_0", "Q5_1"), "older; Q5_K keeps as much in fewer bytes"),
    (("Q4_K_M", "Q4_K_S"), "some loss: the usual choice for chat"),
    (("IQ4_XS", "IQ4_NL"), "some loss: chat in fewer bytes, often slower on a CPU"),
    (("Q4_0", "Q4_1"), "older; IQ4 and Q4_K keep more in as many bytes"),
    (("Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS"), "clear loss: chat where memory is short"),
    (("Q2_K", "Q2_K_S"), "heavy loss; IQ2_M is smaller and keeps more"),
    (("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"), "heavy loss: large models only"),
    (("IQ1_M", "IQ1_S"), "little is left: a last resort for the largest models"),
    (TRAINED_FOR, "only for models trained with such weights; ruins others"),
    (("F32", "F16", "BF16"), "not quantized"))


def use_of(level: str) -> str:
    """Return what a level is good for, in a few words; '' for one that is not known."""
    return next((use for names, use in _USES if level in names), "")
