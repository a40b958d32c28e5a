"""What a release says about itself, and which names a deployed model may have."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from state.clock import utc_now
from state.faults import NightpressError

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadName(NightpressError):
    """A model's name may hold letters, digits, dot, dash and underscore, 80 at most; choose another."""

    exit_code: ClassVar[int] = 44


class NotPromotable(NightpressError):
    """Only a measured candidate that passed can be promoted; simulated results never can."""

    exit_code: ClassVar[int] = 45


class ReleaseDamaged(NightpressError):
    """The deployed release is damaged; go back to the one before with `nightpress rollback`."""

    exit_code: ClassVar[int] = 47


def check_name(name: str) -> str:
    """Return `name` when it is safe as one folder name.

    Raises:
        BadName: anything else, so that no name can lead out of the deploy directory.
    """
    if not _NAME.fullmatch(name):
        raise BadName(
            f"{name[:90]!r} cannot name a deployed model: letters, digits, dot, dash and underscore, "
            "at most 80, beginning with a letter or digit."
        )
    return name


def slug(name: str) -> str:
    """Return a legal name made from any text: `Llama 3 8B / Instruct` becomes `Llama-3-8B-Instruct`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    joined = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    return re.sub(r"-{2,}", "-", joined).lstrip("._-")[:80].rstrip("._-") or "model"


@dataclass(frozen=True)
class Manifest:
    """The facts of a release, in `manifest.json` beside the model; a simulated one cannot be made.

    `imatrix` names what the importance matrix was made from, empty for none. `verdict` says
    `{"state": "passed", ...}`; `model_sha256` is the hash of the unquantized original; `number` and
    `previous` (the release that was current before) are set on publishing.
    """

    model: str
    level: str
    sha256: str
    bytes: int
    run_id: int
    model_sha256: str
    metrics: Mapping[str, Any]
    verdict: Mapping[str, Any]
    engine: str
    nightpress: str
    license: str | None = None
    base_model: str | None = None
    imatrix: str = ""
    simulated: bool = False
    number: int = 0
    previous: int | None = None
    created_at: str = field(default_factory=utc_now)
    smoke: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Refuse what must never be deployed.

        Raises:
            NotPromotable: simulated, or not passed.
            BadName: the model's name would not be safe as a folder.
        """
        check_name(self.model)
        if self.simulated is not False:
            raise NotPromotable("A simulated result cannot be promoted; run the level without --simulate.")
        if self.verdict.get("state") != "passed":
            raise NotPromotable(
                f"{self.level} of {self.model} is {self.verdict.get('state', 'undecided')}; "
                "only a level that passed can be promoted."
            )
        if not _SHA256.fullmatch(self.sha256) or self.bytes <= 0:
            raise NotPromotable(f"{self.level} of {self.model} has no file with a hash; run the level again.")

    def to_json(self) -> str:
        """Return the manifest as indented JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest; fields this version does not know are ignored.

        Raises:
            ReleaseDamaged: missing, unreadable, or not a manifest that could have been published.
        """
        try:
            document = json.loads(path.read_bytes())
            known = {item.name for item in fields(cls)}
            manifest = cls(**{name: value for name, value in document.items() if name in known})
            numbers = (manifest.number, manifest.bytes)
            if any(type(number) is not int for number in numbers):
                raise TypeError("numbers expected")
        except (OSError, ValueError, TypeError, AttributeError, NightpressError) as error:
            raise ReleaseDamaged(
                f"{path} is missing or damaged ({error}); go back with `nightpress rollback`."
            ) from error
        return manifest
