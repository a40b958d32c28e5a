"""The menu of a search for recipes: how each matrix of a model may be stored, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from loops.engine.gguf_check import CheckedModel
from loops.engine.imatrix_file import Imatrix, check_fits
from loops.engine.options import EngineOptions
from loops.engine.size import file_size
from loops.engine.weights import Choice, Matrices
from loops.pass1.sensitivity import NARROW_TYPES, TYPES
from state.faults import NightpressError

_ALWAYS = "Q8_0"


class BudgetImpossible(NightpressError):
    """No recipe of this size is possible; give one between the smallest possible and the original's."""

    exit_code: ClassVar[int] = 79


class Menu:
    """What there is to choose from for one model. Nothing is loaded for it.

    Attributes:
        matrices: that quantizing changes.
        choices: how each may be stored.
        sizes: bytes that each choice takes.
        fixed_bytes: what a file takes besides its matrices.
    """

    def __init__(self, model: CheckedModel, options: EngineOptions, imatrix: Imatrix | None,
                 types: Sequence[str]) -> None:
        """Write the menu.

        Args:
            model: an F32, F16 or BF16 original.
            options: of the engine.
            imatrix: its importance matrix, if there is one; some types need one.
            types: that matrices may get, besides Q8_0 and the original's.

        Raises:
            AlreadyQuantized, NothingToQuantize, ImatrixRefused: the model or the matrix cannot be used.
        """
        if imatrix is not None:
            check_fits(imatrix, model.tensors, "The importance matrix", model.path.name)
        self.model, self._types, self._weighted = model, tuple(types), imatrix is not None
        self.matrices = Matrices(model, options, imatrix)
        self.choices = {name: self._choices_of(name) for name in self.matrices.tensors}
        self.sizes = {name: {choice: self.matrices.n_bytes(name, choice.ggml_type) for choice in found}
                      for name, found in self.choices.items()}
        own = {tensor.name: tensor.ggml_type for tensor in model.tensors}
        self.fixed_bytes = file_size(model, own) - sum(
            self.matrices.n_bytes(name, tensor.ggml_type) for name, tensor in self.matrices.tensors.items())

    def _choices_of(self, name: str) -> list[Choice]:
        wide = not self.matrices.shape(name)[2] % 256
        own = self.matrices.tensors[name].ggml_type
        types = [ggml_type for ggml_type in self._types if ggml_type in (TYPES if wide else NARROW_TYPES)]
        return self.matrices.choices(name, tuple(dict.fromkeys((*types, _ALWAYS, own))))

    @property
    def smallest(self) -> int:
        """Bytes of the smallest recipe."""
        return self.fixed_bytes + sum(min(sizes.values()) for sizes in self.sizes.values())

    def check(self, budget: int) -> None:
        """Refuse a budget that no recipe meets, or that asks for nothing.

        Raises:
            BudgetImpossible: with both figures.
        """
        if budget < self.smallest:
            raise BudgetImpossible(
                f"{budget:,} bytes are too few for {self.model.path.name}: its smallest recipe takes "
                f"{self.smallest:,}. Give a larger budget" + (
                    "." if self._weighted else ", or an importance matrix, which allows smaller types."))
        if budget >= self.model.file_bytes:
            raise BudgetImpossible(f"{budget:,} bytes are no less than the {self.model.file_bytes:,} that "
                                   f"{self.model.path.name} takes unquantized. Give a smaller budget.")
