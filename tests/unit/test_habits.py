"""The habits of the house: what the source may import and contain, and what must be written down."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from state.faults import NightpressError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("calibration_data", "daemon", "loops", "state")
#: what the modules of a package may import of the project, themselves aside
MAY_IMPORT = {
    "calibration_data": ("state.faults", "state.files"),
    "state": (),
    "loops": ("calibration_data", "state.faults", "state.files"),
    "daemon": ("calibration_data", "loops", "state"),
}
HEAVY = ("llama_cpp", "numpy", "sqlalchemy", "torch", "transformers")
CODE_FROM_DATA = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
                   "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput"}
#: a folder of somebody's machine, at the start of a path
SOMEBODYS_FOLDER = re.compile(r"(?<![\w.~$}>*-])/(?:home/[A-Za-z][\w.-]*/|work/|root/|Users/)")
MAX_LINES = 420


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file that belongs to the project: what git tracks or would, else all but tools' leavings."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        leavings = {".git", ".venv", "build", "dist", "__pycache__", ".pytest_cache", ".mypy_cache",
                    ".ruff_cache", ".hypothesis", "nightpress.egg-info"}
        found = [path for path in ROOT.rglob("*") if not leavings & set(path.relative_to(ROOT).parts)]
    return tuple(sorted(path for path in found if path.is_file()))


def sources(*, tests: bool = False) -> list[Path]:
    """The Python files of the tests, or all the others."""
    return [path for path in files() if path.suffix == ".py"
            and (path.relative_to(ROOT).parts[0] == "tests") is tests]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called as far as it has one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(path: Path) -> Iterator[str]:
    """The absolute names a file imports, `package.module.name` for `from package.module import name`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def named(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def command_names() -> list[str]:
    """Full names of the commands, groups left out, as `nightpress data list`."""
    done = subprocess.run([sys.executable, "-c", "\n".join([
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r})",
        "import cli_reference",
        "for name, command, context in cli_reference.commands():",
        "    if not hasattr(command, 'list_commands'): print(name)"])],
        capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def text_of_tests() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sources(tests=True)
                     if path not in (Path(__file__).resolve(), ROOT / "tests" / "conftest.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_in_one_direction(package: str) -> None:
    wrong = [f"{path.relative_to(ROOT)} imports {name}"
             for path in sources() if path.relative_to(ROOT).parts[0] == package
             for name in imports(path)
             if name.partition(".")[0] in {*PACKAGES, "tests"} - {package}
             and not any(within(name, allowed) for allowed in MAY_IMPORT[package])]
    assert wrong == []


def test_no_code_from_data() -> None:
    """Promise 28."""
    wrong = []
    for path in sources():
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imports(path)
                  if name.partition(".")[0] in CODE_FROM_DATA]
        for name, call in calls(path):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            shell = keywords.get("shell")
            unsafe_load = name == "torch.load" and ast.unparse(
                keywords.get("weights_only", ast.Constant(None))) != "True"
            if (name in FORBIDDEN_CALLS or unsafe_load
                    or (shell is not None and ast.unparse(shell) != "False")):
                wrong.append(f"{named(path, call.lineno)} calls {name}")
    assert wrong == []


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = f"import sys, daemon.cli; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_service_starts_without_what_only_its_worker_needs() -> None:
    heavy = set(HEAVY) - {"sqlalchemy"}
    code = f"import sys, daemon.boot, daemon.control; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_reference_of_settings_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/settings_reference.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_is_documented() -> None:
    from daemon.verbs import VERBS

    text = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    assert [verb.path for verb in VERBS.values() if verb.path not in text] == []


def test_the_readme_tells_the_purpose_of_every_file_of_the_daemon() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in (ROOT / "daemon").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if f"  {name}" not in text] == []


@functools.cache
def errors() -> tuple[type[NightpressError], ...]:
    """The base of all errors and every subclass in the packages, all modules imported."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)

    def below(cls: type[NightpressError]) -> Iterator[type[NightpressError]]:
        yield cls
        for child in cls.__subclasses__():
            yield from below(child)

    ours = {cls for cls in below(NightpressError) if cls.__module__.partition(".")[0] in PACKAGES}
    return tuple(sorted(ours, key=lambda cls: (cls.__module__, cls.__qualname__)))


def test_every_error_says_what_went_wrong() -> None:
    wrong = [cls.__qualname__ for cls in errors() if not inspect.cleandoc(cls.__dict__.get("__doc__") or "")]
    assert wrong == []


def test_every_error_has_an_exit_code_of_its_own() -> None:
    """A class that sets no code shares its parent's deliberately, unless the parent is the base."""
    wrong: list[str] = []
    owner: dict[int, type[NightpressError]] = {}
    for cls in errors():
        if "exit_code" in cls.__dict__:
            other = owner.setdefault(cls.exit_code, cls)
            if other is not cls:
                wrong.append(f"{cls.__qualname__} and {other.__qualname__} both exit with {cls.exit_code}")
        elif cls.exit_code == NightpressError.exit_code:
            wrong.append(f"{cls.__qualname__} has no exit code but the base's")
        # 1 and 2 are Python's and the shell's, from 126 on they mean signals, and 130 is Ctrl-C
        if not 2 < cls.exit_code < 126 and cls.__name__ != "Interrupted":
            wrong.append(f"{cls.__qualname__} exits with {cls.exit_code}")
    assert wrong == []


def test_every_failpoint_has_a_test() -> None:
    tests, wrong = text_of_tests(), []
    for path in sources():
        for name, call in calls(path):
            if name.rpartition(".")[2] != "failpoint":
                continue
            first = call.args[0] if call.args else None
            if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                wrong.append(f"{named(path, call.lineno)}: the name is not a literal")
            elif first.value not in tests:
                wrong.append(f"{named(path, call.lineno)}: no test names {first.value}")
    assert wrong == []


def test_the_reference_of_commands_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/cli_reference.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reference_is_the_same_on_any_terminal() -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import cli_reference; print(cli_reference.page())"
    pages = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
                            env={**os.environ, **terminal}).stdout
             for terminal in ({"COLUMNS": "40"}, {"COLUMNS": "200", "FORCE_COLOR": "1", "TERM": "xterm"})}
    assert len(pages) == 1


def test_every_command_is_documented() -> None:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cli.md"))
    names = command_names()
    assert names
    assert [name for name in names if name not in text] == []


def test_every_command_is_tested() -> None:
    tests = text_of_tests()
    assert [name for name in command_names()
            if not re.search(rf"""["' ]{re.escape(name.rpartition(" ")[2])}["' ]""", tests)] == []


def test_ci_runs_the_commands_that_the_documents_name() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    last = script.rstrip().splitlines()[-1]
    assert last.startswith("pytest ")
    assert last in (ROOT / "README.md").read_text(encoding="utf-8")
    install = next(line for line in script.splitlines() if line.startswith("stage install "))
    documents = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    assert any(install.removeprefix("stage install ") in document for document in documents)


def test_every_task_of_the_makefile_is_one_word_and_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY:"))
    explained = re.findall(r"^([a-z]+):.*## ", text, flags=re.MULTILINE)
    assert sorted(shlex.split(phony)[1:]) == sorted(explained)


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in [*sources(), *sources(tests=True)]
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert long == {}


def test_no_path_of_somebodys_machine() -> None:
    wrong = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # not text
            continue
        wrong += [f"{named(path, number)}: {line.strip()[:100]}"
                  for number, line in enumerate(text.splitlines(), 1) if SOMEBODYS_FOLDER.search(line)]
    assert wrong == []


def test_no_test_sleeps() -> None:
    wrong = [named(path, call.lineno) for path in sources(tests=True) for name, call in calls(path)
             if name.rpartition(".")[2] == "sleep"]
    assert wrong == []
