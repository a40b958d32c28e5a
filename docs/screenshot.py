"""Draw docs/run.svg, the picture in the README, from the last run in the ledger: real output, real figures.

Run it after `nightpress run`: python docs/screenshot.py
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from daemon.cli.tables import print_run
from daemon.settings import Settings
from daemon.summary import summarise
from state.ledger import Ledger

PICTURE = Path(__file__).with_name("run.svg")


def main() -> None:
    """Write the picture."""
    out = Console(record=True, width=126, file=io.StringIO(), force_terminal=True, highlight=False)
    with Ledger.read(Settings.load().state_dir) as ledger:
        summary = summarise(ledger, ledger.latest_run_id() or 0)
    home = str(Settings.load().state_dir)
    for release in summary["releases"]:
        release["path"] = release["path"].replace(home, "~/.local/state/nightpress")
    out.print("$ nightpress run", style="bold")
    print_run(out, summary)
    drawn = out.export_svg(title="nightpress run")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # no font is fetched from anywhere
    PICTURE.write_text(drawn.replace("Fira Code", "monospace"), encoding="utf-8")


if __name__ == "__main__":
    main()
