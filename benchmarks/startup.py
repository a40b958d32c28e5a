"""Time of `nightpress --help`, from start to end of its process: the median of ten.

The first of eleven runs, which reads the files from disk and compiles them, is left out.

    python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from timing import ProgramFailed, finish, options, run_program

ALLOWED_S = 0.4


def command() -> list[str]:
    """Return the installed command of this environment, else the same by Python."""
    script = Path(sys.executable).with_name("nightpress")
    return [str(script)] if script.exists() else [sys.executable, "-c", "from daemon.cli import main; main()"]


def main() -> int:
    """Measure and print."""
    arguments = options(__doc__, rounds=10).parse_args()
    program = [*command(), "--help"]
    try:
        run_program(program)
    except ProgramFailed as problem:
        print(f"Not measured: {problem}.")
        return 0
    seconds = sorted(run_program(program)[1] for _ in range(arguments.rounds))
    python = sorted(run_program([sys.executable, "-c", "pass"])[1] for _ in range(arguments.rounds))
    median = statistics.median(seconds)
    print(f"nightpress --help: {median:.3f} s ({seconds[0]:.3f} to {seconds[-1]:.3f}), "
          f"of which Python alone {statistics.median(python):.3f} s")
    return finish("startup", arguments, {"seconds": seconds, "python_s": python}, median < ALLOWED_S,
                  f"nightpress --help in under {ALLOWED_S} s")


if __name__ == "__main__":
    raise SystemExit(main())
