"""Named ladders of levels, known without loading the engine."""

from __future__ import annotations

#: the ladder of the original tool, from large to small
ORIGINAL_LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_L", "Q2_K")
