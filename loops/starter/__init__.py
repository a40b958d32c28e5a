"""The small model that ships with the service, its recipe, and its evaluation text.

`STARTER` names it for people: its GGUF or, where a folder is wanted, its folder. `STARTER_GGUF`
is the model in F16, `HELD_OUT` the text its levels are measured on. The recipe is `corpus.py`
(what it is trained on) and `train.py` (how), `folder.py` writes it as a Hugging Face folder, and
MODEL_CARD.md says what the model can and cannot do.
"""

from __future__ import annotations

from pathlib import Path

STARTER = "starter"
STARTER_GGUF: Path = Path(__file__).with_name("starter-f16.gguf")
HELD_OUT: Path = Path(__file__).with_name("held_out.txt")
