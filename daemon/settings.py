"""The settings: one frozen object from the settings file and the environment, unknown keys refused."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon.errors import SettingsWrong

FILE = "nightpress.toml"
PREFIX = "NIGHTPRESS_"
#: variables with the prefix that are not settings
_NOT_SETTINGS = {"NIGHTPRESS_FAILPOINT", "NIGHTPRESS_TESTING", "NIGHTPRESS_CONFIG_DIR"}


def _place(systemd: str, xdg: str, home: str) -> Path:
    """Return the folder that systemd gives us, or the XDG one; systemd may list several."""
    given = os.environ.get(systemd, "").split(":")[0]
    if given:
        return Path(given)
    base = os.environ.get(xdg, "")
    return (Path(base) if base.startswith("/") else Path.home() / home) / "nightpress"


def default_state_dir() -> Path:
    """Return `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/nightpress`."""
    return _place("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def config_dir() -> Path:
    """Return `$CONFIGURATION_DIRECTORY`, else `$XDG_CONFIG_HOME/nightpress`."""
    given = os.environ.get("NIGHTPRESS_CONFIG_DIR")
    return Path(given) if given else _place("CONFIGURATION_DIRECTORY", "XDG_CONFIG_HOME", ".config")


class Settings(BaseModel):
    """Everything that can be set, with the unit in the name.

    Sources, the later wins: `nightpress.toml` in the configuration folder, `NIGHTPRESS_…` variables,
    options of a command.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_dir: Path = Field(default_factory=default_state_dir, description="ledger, blobs, checkpoints")
    deploy_dir: Path | None = Field(None, description="releases; `deploy` in the state folder unless set")
    output_dir: Path | None = Field(None, description="summaries; `output` in the state folder unless set")
    disk_budget_bytes: int = Field(50_000_000_000, gt=0, description="most disk for finished levels")
    keep_releases: int = Field(5, ge=2, description="releases of a model to keep")
    keep_backups: int = Field(5, ge=1, description="JSON backups of the ledger to keep")
    threads: int = Field(0, ge=0, le=1024, description="threads of the engine; 0 means one per processor")
    gpu_layers: int = Field(0, ge=-1, description="layers to offload to a GPU; -1 means all")

    @property
    def deploy(self) -> Path:
        """Where releases lie."""
        return (self.deploy_dir or self.state_dir / "deploy").absolute()

    @property
    def output(self) -> Path:
        """Where summaries lie."""
        return (self.output_dir or self.state_dir / "output").absolute()

    @property
    def blobs(self) -> Path:
        """Where finished levels lie, by hash."""
        return self.state_dir.absolute() / "blobs"

    @property
    def scratch(self) -> Path:
        """Where checkpoints of unfinished work lie."""
        return self.state_dir.absolute() / "scratch"

    @classmethod
    def load(cls, **options: Any) -> Self:
        """Return the settings from file, environment and options; an option that is None is not set.

        Raises:
            SettingsWrong: naming the key, where it stands, and the nearest known key.
        """
        file = config_dir() / FILE
        values: dict[str, Any] = {}
        source: dict[str, str] = {}
        try:
            if file.exists():
                values = tomllib.loads(file.read_text(encoding="utf-8"))
                source = dict.fromkeys(values, str(file))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
            raise SettingsWrong(f"{file} cannot be read: {problem}.") from problem
        for name, value in os.environ.items():
            key = name.removeprefix(PREFIX).lower()
            if name.startswith(PREFIX) and name not in _NOT_SETTINGS and key in cls.model_fields:
                values[key], source[key] = value, f"${name}"
        values.update({name: value for name, value in options.items() if value is not None})
        try:
            return cls.model_validate(values)
        except ValidationError as problem:
            first = problem.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else "?"
            where = source.get(key, "the command line")
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, cls.model_fields, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise SettingsWrong(f"{where} sets {key!r}, which is no setting.{hint}") from problem
            raise SettingsWrong(f"{where} sets {key} to {values.get(key)!r}: {first['msg']}.") from problem
