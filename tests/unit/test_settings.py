"""The settings: where they come from, what is refused and how it is told, and the file that explains them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import settings as module
from daemon.boot import check_settings
from daemon.errors import SettingsWrong
from daemon.settings import (
    ModelEntry,
    Settings,
    config_dir,
    default_runtime_dir,
    default_state_dir,
    settings_file,
    template,
    type_words,
)
from daemon.watchdog import Limits

Write = Callable[[str], Path]
#: whole numbers of things, whose unit is what they count
COUNTS = {"keep_releases", "keep_backups", "threads", "gpu_layers", "max_attempts"}
UNITS = ("_s", "_bytes", "_percent", "_days", "_c", "_per_cpu")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back the one setting that tests side by side are given."""
    monkeypatch.delenv("NIGHTPRESS_THREADS", raising=False)


@pytest.fixture
def write() -> Write:
    """Write the settings file."""
    def file(text: str) -> Path:
        settings_file().write_text(text, encoding="utf-8")
        return settings_file()

    return file


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(Path(sys.executable).with_name("nightpress")), *arguments], capture_output=True,
                          text=True, timeout=120, env={**os.environ, "COLUMNS": "200", **environment})


# --- sources ---


def test_options_win_over_the_environment_and_that_over_the_file(write: Write,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("keep_backups = 11\nkeep_releases = 11\nthreads = 11\nmax_attempts = 11\n")
    for name in ("KEEP_RELEASES", "THREADS"):
        monkeypatch.setenv(f"NIGHTPRESS_{name}", "22")
    settings, sources = Settings.load_with_sources(threads=33, keep_backups=None)
    assert (settings.keep_backups, settings.keep_releases, settings.threads) == (11, 22, 33)
    assert settings.gpu_layers == 0
    assert {name: sources.get(name) for name in ("keep_backups", "keep_releases", "threads", "gpu_layers")} == {
        "keep_backups": str(file), "keep_releases": "$NIGHTPRESS_KEEP_RELEASES", "threads": "the command line",
        "gpu_layers": None}


def test_without_any_source_everything_is_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIR", "DEPLOY_DIR"):
        monkeypatch.delenv(f"NIGHTPRESS_{name}")
    settings, sources = Settings.load_with_sources()
    assert settings == Settings()
    assert sources == {}
    assert settings.limits == Limits()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().threads = 3  # type: ignore[misc]


def test_variables_of_other_meaning_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAILPOINT", "TESTING", "EVENT", "CI_VENV"):
        monkeypatch.setenv(f"NIGHTPRESS_{name}", "x")
    Settings.load()


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("sensors", "cpu, memory ,", ("cpu", "memory")), ("sensors", '["cpu", "memory"]', ("cpu", "memory")),
    ("sensors", "", ()), ("watch", "/a,/b c", (Path("/a"), Path("/b c"))), ("watch", '["/a,b"]', (Path("/a,b"),)),
    ("on_promote", ' ["/bin/sh", "-c", "true, false"]', ("/bin/sh", "-c", "true, false")),
    ("models", '[{"path": "/m.gguf", "priority": 3}]', (ModelEntry(path=Path("/m.gguf"), priority=3),)),
    ("on_battery", "true", True), ("tick_s", "2.5", 2.5), ("webhook", "http://x/[1]", "http://x/[1]"),
    ("deploy_dir", "/d", Path("/d")), ("log_level", "debug", "debug")])
def test_a_variable_holds_text_a_list_with_commas_or_json(monkeypatch: pytest.MonkeyPatch, name: str, text: str,
                                                         expected: Any) -> None:
    monkeypatch.setenv(f"NIGHTPRESS_{name.upper()}", text)
    assert getattr(Settings.load(), name) == expected


# --- refusals ---


@pytest.mark.parametrize(("text", "words"), [
    ("idle_after = 5", "sets 'idle_after', which is no setting. Did you mean idle_after_s?"),
    ("qqq = 5", "sets 'qqq', which is no setting. `nightpress config show` lists them all."),
    ('[[models]]\npath = "m.gguf"\npriorty = 3', "sets 'models.0.priorty', which is no setting. Did you mean prio"),
    ("[[models]]\nname = 'm'", "sets models.0.path to "), ("threads = -1", "sets threads to -1: "),
    ("tick_s = 60", "sets tick_s to 60: "), ('threads = "many"', "sets threads to 'many': "),
    ("tick_s = nan", "sets tick_s to nan: "), ('log_level = "loud"', "sets log_level to 'loud': "),
    ("keep_releases = 1", "sets keep_releases to 1: "), ("models = [3]", "sets models.0 to 3: ")])
def test_a_wrong_line_of_the_file_is_told_with_the_file_and_the_key(write: Write, text: str, words: str) -> None:
    file = write(text)
    with pytest.raises(SettingsWrong) as told:
        Settings.load()
    assert str(told.value).startswith(f"{file} {words}")
    assert told.value.exit_code == 78


@pytest.mark.parametrize(("name", "text", "words"), [
    ("NIGHTPRESS_IDLE_AFTER", "5", "$NIGHTPRESS_IDLE_AFTER sets 'idle_after', which is no setting. Did "),
    ("NIGHTPRESS_THREADS", "many", "$NIGHTPRESS_THREADS sets threads to 'many': "),
    ("NIGHTPRESS_WATCH", '["/a"', "$NIGHTPRESS_WATCH is no JSON list: "),
    ("NIGHTPRESS_SENSORS", "cpu,weather", "sensors names 'weather'; there are cpu, "),
    ("NIGHTPRESS_NIGHTLY_AT", "3:30", "nightly_at is '3:30'; write a time of day such as 03:30."),
    ("NIGHTPRESS_NIGHTLY_AT", "24:00", "nightly_at is '24:00'; "),
    ("NIGHTPRESS_NIGHTLY_AT", "03:30\n", "nightly_at is '03:30\\n'; "),
    ("NIGHTPRESS_MODELS", '[{"path": "/m", "levle": 1}]', "$NIGHTPRESS_MODELS sets 'models.0.levle', which is no ")])
def test_a_wrong_variable_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str,
                                              words: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsWrong) as told:
        Settings.load()
    assert str(told.value).startswith(words)


def test_a_wrong_option_is_told_as_one() -> None:
    with pytest.raises(SettingsWrong, match=r"^the command line sets threads to 5000: "):
        Settings.load(threads=5000)


@pytest.mark.parametrize("content", [b"threads = ", b"\xff\xfe", b"threads = 1\nthreads = 2"])
def test_a_file_that_cannot_be_read_is_told(content: bytes) -> None:
    settings_file().write_bytes(content)
    with pytest.raises(SettingsWrong, match="cannot be read"):
        Settings.load()


def test_a_folder_in_place_of_the_file_is_told() -> None:
    settings_file().mkdir()
    with pytest.raises(SettingsWrong, match="cannot be read"):
        Settings.load()


def test_models_that_are_no_list_are_refused_in_a_sentence(write: Write) -> None:
    write("models = 5\n")
    with pytest.raises(SettingsWrong, match="sets models to 5"):
        Settings.load()


@pytest.mark.parametrize("text", ['output_dir = "~nobody-of-that-name/x"', 'watch = ["~nobody-of-that-name/x"]',
                                  '[[models]]\npath = "~nobody-of-that-name/m.gguf"'])
def test_the_home_of_nobody_is_refused_in_a_sentence(write: Write, text: str) -> None:
    write(text)
    with pytest.raises(SettingsWrong):
        Settings.load()


# --- places ---


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(write: Write) -> None:
    write('state_dir = "~/s"\noutput_dir = "~/o"\nsocket_path = "~/k"\nwatch = ["~/w", "/w"]\n'
          '[[models]]\npath = "~/m.gguf"\n')
    settings, home = Settings.load(state_dir="~/mine"), Path.home()
    assert settings.state_dir == home / "mine"
    assert (settings.output, settings.socket) == (home / "o", home / "k")
    assert settings.watch == (home / "w", Path("/w"))
    assert settings.models[0].path == home / "m.gguf"


def test_a_model_in_the_file_is_looked_for_beside_the_file(write: Write, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write('[[models]]\npath = "models/m.gguf"\n[[models]]\npath = "/abs/m.gguf"\n')
    assert [entry.path for entry in Settings.load().models] == [
        config_dir() / "models" / "m.gguf", Path("/abs/m.gguf")]


def test_everything_lies_in_the_state_folder_unless_said_otherwise(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIGHTPRESS_DEPLOY_DIR")
    monkeypatch.chdir(tmp_path)
    settings = Settings.load(state_dir="here")
    base = tmp_path / "here"
    assert (settings.deploy, settings.output, settings.blobs, settings.scratch) == (
        base / "deploy", base / "output", base / "blobs", base / "scratch")


def test_the_state_folder_is_systemds_or_xdgs_or_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_state_dir() == Path(os.environ["XDG_STATE_HOME"]) / "nightpress"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert default_state_dir() == Path("/var/lib/one")
    monkeypatch.delenv("STATE_DIRECTORY")
    for wrong in ("", "relative/folder"):
        monkeypatch.setenv("XDG_STATE_HOME", wrong)
        assert default_state_dir() == Path.home() / ".local/state/nightpress"


def test_the_file_is_where_asked_for_or_systemds_or_xdgs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_file() == Path(os.environ["NIGHTPRESS_CONFIG_DIR"]) / "nightpress.toml"
    monkeypatch.delenv("NIGHTPRESS_CONFIG_DIR")
    assert config_dir() == Path(os.environ["XDG_CONFIG_HOME"]) / "nightpress"
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", "/etc/nightpress")
    assert config_dir() == Path("/etc/nightpress")


def test_the_socket_is_systemds_or_xdgs_or_in_a_folder_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().socket == Path(os.environ["XDG_RUNTIME_DIR"]) / "nightpress" / "nightpressd.sock"
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    assert Settings.load().socket == Path("/run/one/nightpressd.sock")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    for wrong in ("", "relative"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", wrong)
        assert default_runtime_dir() == Path(tempfile.gettempdir()) / f"nightpress-{os.getuid()}"
    assert Settings.load(socket_path="/elsewhere/s").socket == Path("/elsewhere/s")


def test_the_service_of_the_whole_system_is_asked_where_only_that_is_there(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYSTEM_RUNTIME_DIR", tmp_path)
    own, system = Settings.load().socket, tmp_path / "nightpressd.sock"
    assert Settings.load().socket_to_ask == own
    system.touch()
    assert Settings.load().socket_to_ask == system
    assert Settings.load().socket == own, "a service of one's own still listens on its own socket"
    assert Settings.load(socket_path=own).socket_to_ask == own
    own.parent.mkdir()
    own.touch()
    assert Settings.load().socket_to_ask == own


# --- names, units and the template ---


def test_every_number_has_its_unit_in_its_name() -> None:
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float):
            assert name in COUNTS or name.endswith(UNITS), name


def test_every_setting_says_what_it_is() -> None:
    for fields in (Settings.model_fields, ModelEntry.model_fields):
        assert [name for name, field in fields.items() if not field.description] == []


def test_what_counts_as_idle_follows_the_settings() -> None:
    assert Limits.__dataclass_fields__.keys() - Settings.model_fields.keys() <= {"stale_after_s", "release_share"}
    limits = Settings.load(idle_after_s=7, cpu_percent=33, hours="22:00-07:00", sensors=("cpu",)).limits
    assert (limits.idle_after_s, limits.cpu_percent, limits.hours, limits.sensors) == (7, 33, "22:00-07:00", ("cpu",))


@pytest.mark.parametrize(("name", "words"), [
    ("threads", "whole number"), ("tick_s", "number"), ("on_battery", "yes or no"), ("state_dir", "path"),
    ("deploy_dir", "path"), ("watch", "list"), ("webhook", "text"), ("log_level", "debug or info or warning or error")])
def test_what_a_setting_holds_is_told_in_words(name: str, words: str) -> None:
    assert type_words(Settings.model_fields[name].annotation) == words


def test_the_template_changes_nothing_and_names_everything(write: Write) -> None:
    before = Settings.load()
    write(template())
    assert Settings.load() == before
    for name in (*Settings.model_fields, *ModelEntry.model_fields):
        assert re.search(rf"^# (\[\[)?{name}\b", template(), re.MULTILINE), name


def test_the_template_uncommented_line_by_line_still_changes_nothing(write: Write,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"^# ([a-z_]+ = [^\s#].*)$", r"\1", template(), flags=re.MULTILINE)
    values = tomllib.loads(text)
    assert set(Settings.model_fields) - set(values) == {
        "models", "state_dir", *(name for name, field in Settings.model_fields.items() if field.default is None)}
    before = Settings.load()
    write(text)
    assert Settings.load() == before


def test_a_model_of_the_template_filled_in_is_read(write: Write) -> None:
    text = template().replace("# [[models]]", "[[models]]").replace("# path =  #", 'path = "/m.gguf"  #')
    write(text)
    assert Settings.load().models == (ModelEntry(path=Path("/m.gguf")),)


# --- commands ---


def test_config_init_writes_the_template_and_never_over_a_file_unasked() -> None:
    settings_file().parent.rmdir()
    done = cli("config", "init")
    assert (done.returncode, done.stdout.strip()) == (0, f"Wrote {settings_file()}.")
    assert settings_file().read_text() == template()
    assert settings_file().stat().st_mode & 0o777 == 0o600
    settings_file().write_text("threads = 3\n")
    again = cli("config", "init")
    assert again.returncode == 78
    assert "--force replaces it" in again.stderr
    assert settings_file().read_text() == "threads = 3\n"
    assert cli("config", "init", "--force").returncode == 0
    assert settings_file().read_text() == template()


def test_config_init_writes_where_it_is_told_to(tmp_path: Path) -> None:
    assert cli("config", "init", "-o", str(tmp_path / "new" / "mine.toml")).returncode == 0
    assert (tmp_path / "new" / "mine.toml").read_text() == template()
    assert not settings_file().exists()


def test_config_show_tells_every_setting_and_where_it_was_set(write: Write) -> None:
    file = write("threads = 3\n")
    shown = json.loads(cli("config", "show", "--json", NIGHTPRESS_TICK_S="2").stdout)
    assert shown["file"] == str(file)
    assert set(shown["settings"]) == set(Settings.model_fields)
    assert (shown["settings"]["threads"], shown["settings"]["tick_s"]) == (3, 2)
    assert (shown["sources"]["threads"], shown["sources"]["tick_s"]) == (str(file), "$NIGHTPRESS_TICK_S")
    told = cli("config", "show").stdout
    assert [name for name in Settings.model_fields if name not in told] == []
    assert "(not there)" not in told


def test_config_check_tells_of_sound_settings_and_of_models_that_are_not_there(write: Write) -> None:
    write('[[models]]\npath = "none.gguf"\n')
    sound = cli("config", "check")
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.splitlines() == [
        "The settings are sound.",
        f"There is no file {config_dir() / 'none.gguf'}; its model is queued once there is."]


def test_config_check_refuses_with_a_sentence(write: Write) -> None:
    write('hours = "25:00-26:00"')
    wrong = cli("config", "check")
    assert (wrong.returncode, wrong.stdout) == (78, "")
    assert wrong.stderr.startswith("nightpress: ")
    assert "25:00-26:00" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(("text", "words"), [
    ('webhook = "ftp://x"', "webhook"), ('on_promote = ["no-such-program-anywhere"]', "no-such-program"),
    ('on_failure = ["no-such-program-anywhere"]', "no-such-program"),
    ('[[models]]\npath = "m.gguf"\ntarget_size = "huge"', "'huge'"),
    ('[[models]]\npath = "m.gguf"\ngates = ["luck:0.1"]', "luck"),
    ('[[models]]\npath = "m.gguf"\nname = "../x"', "'../x'")])
def test_what_only_the_service_needs_is_checked_too(write: Write, text: str, words: str) -> None:
    write(text)
    with pytest.raises(SettingsWrong) as told:
        check_settings(Settings.load())
    assert words in str(told.value)
