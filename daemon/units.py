"""What makes the daemon a service: unit files for systemd, an agent for launchd.

This module writes and removes files, and asks the service manager for the state. It starts and
stops nothing.
"""

from __future__ import annotations

import hashlib
import os
import plistlib
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from state.faults import NightpressError
from state.files import explained, fsync_folder, make_folder, write_atomic

UNIT = "nightpress.service"
LABEL = "io.nightpress.daemon"
#: how long the service manager may take to answer
ANSWER_WITHIN_S = 5.0


class UnitChanged(NightpressError):
    """The service's file was changed by hand, or is not ours; keep what you need, then repeat with --force."""

    exit_code: ClassVar[int] = 10


class ServiceUnsupported(NightpressError):
    """This machine has no such service manager; choose another kind of service, or run `nightpress daemon` yourself."""

    exit_code: ClassVar[int] = 11


class Kind(StrEnum):
    """Which service manager runs the daemon, and for whom."""

    SYSTEM = "system"
    USER = "user"
    LAUNCHD = "launchd"


class Outcome(StrEnum):
    """The state that installing or uninstalling reached."""

    INSTALLED = "installed"
    REPLACED = "replaced"
    ALREADY_INSTALLED = "already_installed"
    REMOVED = "removed"
    ALREADY_REMOVED = "already_removed"


class Seal(StrEnum):
    """What the first line of a file says about the rest."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class UnitStatus:
    """What is known about a service; None where nobody could say, `note` says why.

    `enabled`, `active` and `detail` are the manager's own words. `restarts` counts those since
    somebody started the service.
    """

    kind: Kind
    path: Path
    installed: bool
    seal: Seal | None = None
    enabled: str | None = None
    active: str | None = None
    detail: str | None = None
    main_pid: int | None = None
    restarts: int | None = None
    note: str | None = None


_TEMPLATES = {Kind.SYSTEM: "nightpress.service", Kind.USER: "nightpress-user.service", Kind.LAUNCHD: f"{LABEL}.plist"}
#: an XML file must begin with its declaration, so there the seal is the second line
_SEAL = re.compile(rb"\A(<\?xml[^\n]*\n)?(?:# nightpress-sha256 ([0-9a-f]{64})|"
                   rb"<!-- nightpress-sha256 ([0-9a-f]{64}) -->)\n")


def platform_kind(*, system: bool, platform: str = sys.platform) -> Kind:
    """Return the kind of service for a platform.

    Raises:
        ServiceUnsupported: a system service on macOS; there, only an agent is offered.
    """
    if platform != "darwin":
        return Kind.SYSTEM if system else Kind.USER
    if system:
        raise ServiceUnsupported("On macOS the daemon runs as an agent of a user; leave out --system.")
    return Kind.LAUNCHD


def require_manager(kind: Kind) -> None:
    """Do nothing where the service manager of this kind is installed.

    Raises:
        ServiceUnsupported: it is not.
    """
    program = "launchctl" if kind is Kind.LAUNCHD else "systemctl"
    if shutil.which(program) is None:
        raise ServiceUnsupported(f"This machine has no {program}; run `nightpress daemon` under what it has, "
                                 "or print the file with --dry-run.")


def where(kind: Kind) -> Path:
    """Return the path of the installed file."""
    if kind is Kind.SYSTEM:
        return Path("/etc/systemd/system") / UNIT
    if kind is Kind.LAUNCHD:
        return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "systemd" / "user" / UNIT


def closed_folder(program: Path) -> Path | None:
    """Return a folder on the way to the program or its interpreter that other accounts may not enter, None for none.

    The interpreter is this process's; a virtual environment may point to one in somebody's home.
    """
    ways = (program.absolute(), program.resolve(), Path(sys.executable).resolve())
    folders = (folder for way in ways for folder in reversed(way.parents))
    return next((folder for folder in folders if not folder.stat().st_mode & stat.S_IXOTH), None)


def render(kind: Kind, program: Path, *, home: Path | None = None) -> bytes:
    """Return the sealed file that starts `program`; `home` is where an agent's log lies.

    Raises:
        ServiceUnsupported: launchd cannot express the path; systemd can express all of them.
        ValueError: the path is not absolute.
    """
    if not program.is_absolute():
        raise ValueError(f"{program} is not absolute")
    template = _template(kind)
    if kind is Kind.LAUNCHD:
        return seal(_plist(template, program, home or Path.home()))
    lines = template.decode("utf-8").splitlines(keepends=True)
    at = [number for number, line in enumerate(lines) if line.startswith("ExecStart=")]
    assert len(at) == 1, kind  # noqa: S101 - our own template
    lines[at[0]] = f"ExecStart={_exec_start(program)}\n"
    return seal("".join(lines).encode("utf-8"))


def _template(kind: Kind) -> bytes:
    """Read the template: beside the package in a checkout, else where the wheel put it."""
    checkout = Path(__file__).resolve().parents[1] / "systemd" / _TEMPLATES[kind]
    installed = Path(sys.prefix) / "share" / "nightpress" / "systemd" / _TEMPLATES[kind]
    return (checkout if checkout.is_file() else installed).read_bytes()


def _exec_start(program: Path) -> str:
    """Return the command as systemd.service(5) wants it; a leading colon means: no variables in here."""
    text = str(program)
    if re.search(r"""["'\\\x00-\x1f\x7f]""", text):
        # systemd refuses such a name as a program, but takes it as an argument
        return rf':/bin/sh -c "exec \"$0\"" {_quoted(text)}'
    return f":{_quoted(text)}"


def _quoted(text: str) -> str:
    """Return one word in quotes: % begins a specifier, bytes that are not UTF-8 or not printable are escaped."""
    def escape(character: str) -> str:
        if character in '"\\':
            return f"\\{character}"
        if character == "%":
            return "%%"
        if character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff":
            return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
        return character

    return f'"{"".join(map(escape, text))}"'


def _plist(template: bytes, program: Path, home: Path) -> bytes:
    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        if value == "@PROGRAM@":
            return str(program)
        if isinstance(value, str) and value.startswith("@HOME@/"):
            return str(home / value.removeprefix("@HOME@/"))
        return value

    try:
        return plistlib.dumps(fill(plistlib.loads(template)), sort_keys=False)
    except ValueError as error:  # control characters, and bytes that are not UTF-8
        raise ServiceUnsupported(f"launchd cannot start {str(program)!r} or write below {str(home)!r}: choose "
                                 "paths without control characters.") from error


def seal(content: bytes) -> bytes:
    """Return content with a line that carries the sha256 of all the others."""
    found = hashlib.sha256(content).hexdigest()
    if content.startswith(b"<?xml"):
        declaration, _, rest = content.partition(b"\n")
        return declaration + f"\n<!-- nightpress-sha256 {found} -->\n".encode() + rest
    return f"# nightpress-sha256 {found}\n".encode() + content


def examine(content: bytes) -> Seal:
    """Say whether content is ours, and whether it is as we wrote it."""
    found = _SEAL.match(content)
    if found is None:
        return Seal.FOREIGN
    rest = (found[1] or b"") + content[found.end():]
    same = hashlib.sha256(rest).hexdigest().encode() == (found[2] or found[3])
    return Seal.UNCHANGED if same else Seal.CHANGED


def _read(path: Path) -> tuple[bytes, Seal] | None:
    """Return what lies at path, None for nothing. A link is never ours: `systemctl mask` makes one."""
    if path.is_symlink():
        return b"", Seal.FOREIGN
    if path.is_dir():
        raise UnitChanged(f"{path} is a folder; move it away first.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content, examine(content)


def _refuse(path: Path, found: Seal, verb: str) -> UnitChanged:
    what = "was changed by hand" if found is Seal.CHANGED else "was not written by Nightpress"
    return UnitChanged(f"{path} {what}; look at it, move what you need into a drop-in (`systemctl edit`), then "
                       f"{verb} it with --force.")


def install(kind: Kind, program: Path, *, force: bool = False, path: Path | None = None) -> Outcome:
    """Write the file that starts `program`; an older version of ours gives way, anything else only to `force`.

    Raises:
        UnitChanged: the file that is there was changed, or is not ours.
        ServiceUnsupported: see `render`.
        DiskFull, StateUnwritable: as `state.files.explained` says.
    """
    path = path or where(kind)
    content = render(kind, program)
    with explained(path):
        there = _read(path)
        if there is not None:
            if there[0] == content:
                return Outcome.ALREADY_INSTALLED
            if there[1] is not Seal.UNCHANGED and not force:
                raise _refuse(path, there[1], "overwrite")
        make_folder(path.parent, 0o755)
        write_atomic(path, content, mode=0o644)
    return Outcome.INSTALLED if there is None else Outcome.REPLACED


def uninstall(kind: Kind, *, force: bool = False, path: Path | None = None) -> Outcome:
    """Remove the file when it is as we wrote it, else only with `force`; drop-ins stay.

    Raises:
        UnitChanged: the file was changed, or is not ours.
        StateUnwritable: its folder cannot be written.
    """
    path = path or where(kind)
    with explained(path):
        there = _read(path)
        if there is None:
            return Outcome.ALREADY_REMOVED
        if there[1] is not Seal.UNCHANGED and not force:
            raise _refuse(path, there[1], "remove")
        path.unlink()
        fsync_folder(path.parent)
    return Outcome.REMOVED


def status(kind: Kind, *, path: Path | None = None) -> UnitStatus:
    """Say what is installed and what the manager says about it, within about `ANSWER_WITHIN_S`; raises nothing.

    A manager that is missing, silent or refuses leaves its part at None, with a note.
    """
    path = path or where(kind)
    try:
        there = _read(path)
    except (OSError, UnitChanged) as error:
        return UnitStatus(kind, path, installed=False, note=f"The file cannot be read: {error}")
    known = UnitStatus(kind, path, there is not None, there[1] if there else None)
    words = (["launchctl", "print", f"gui/{os.getuid()}/{LABEL}"] if kind is Kind.LAUNCHD else
             ["systemctl", *(["--user"] if kind is Kind.USER else []), "show", "--no-pager",
              f"--property={','.join(_PROPERTIES)}", UNIT])
    answer = _ask(words)
    if isinstance(answer, str):
        return UnitStatus(kind, path, known.installed, known.seal, note=answer)
    told = _agent(answer) if kind is Kind.LAUNCHD else _unit(answer)
    return UnitStatus(kind, path, known.installed, known.seal, **told)


_PROPERTIES = ("UnitFileState", "ActiveState", "SubState", "StatusText", "MainPID", "NRestarts", "Result",
               "NeedDaemonReload")


def _ask(words: list[str]) -> list[tuple[str, str]] | str:
    """Return the `key = value` lines of an answer, or a sentence why there is none."""
    try:
        done = subprocess.run(words, capture_output=True, text=True,  # noqa: S603 - words of our own
                              errors="replace", check=False, timeout=ANSWER_WITHIN_S, stdin=subprocess.DEVNULL,
                              env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        return f"This machine has no {words[0]}."
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]} did not answer: {error}"
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[0]
        return f"{words[0]} says: {said}"
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return [(key.strip(), value.strip()) for key, found, value in pairs if found]


def _unit(answer: list[tuple[str, str]]) -> dict[str, Any]:
    """Read an answer of `systemctl show`."""
    told = dict(answer)
    detail = told.get("StatusText") or told.get("SubState")
    if told.get("Result", "success") != "success":
        detail = f"{detail} ({told['Result']})"
    stale = told.get("NeedDaemonReload") == "yes"
    return {"enabled": told.get("UnitFileState") or None, "active": told.get("ActiveState") or None,
            "detail": detail or None, "main_pid": _number(told.get("MainPID")) or None,
            "restarts": _number(told.get("NRestarts")),
            "note": "The file is newer than what systemd knows; run daemon-reload." if stale else None}


def _agent(answer: list[tuple[str, str]]) -> dict[str, Any]:
    """Read an answer of `launchctl print`; the agent's own lines come before those of what belongs to it."""
    told: dict[str, str] = {}
    for key, value in answer:
        told.setdefault(key, value)
    return {"active": told.get("state"), "detail": f"last exit code {told.get('last exit code', 'unknown')}",
            "main_pid": _number(told.get("pid")), "restarts": None}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
