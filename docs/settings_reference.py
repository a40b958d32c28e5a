"""Write docs/settings.md, the list of every setting, from the settings model itself.

    python docs/settings_reference.py          write it
    python docs/settings_reference.py --check  exit 1 when it is stale

The text depends on nothing but the settings model: no file, no environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

<!-- Written by `python docs/settings_reference.py` (`make docs`) from daemon/settings.py. Do not edit. -->

They come from `nightpress.toml` in `$CONFIGURATION_DIRECTORY`, else `$XDG_CONFIG_HOME/nightpress`, else
`~/.config/nightpress`; from `NIGHTPRESS_…` variables (a list is JSON, or has commas between its parts); and from
options of a command; the later over the earlier. An unknown name is refused, with the nearest known one.
`nightpress config init` writes a file with all of them commented out, `config check` checks it, `config show` prints
what holds and where it was set. A running service takes new settings with `nightpress reload`; wrong ones are refused
and the old ones stay.

"""
MODELS = """

`state_dir` is `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/nightpress`, else `~/.local/state/nightpress`. `sensors` names
those that count. A relative path in the file is relative to the file.

## Models to press

Each is a table `[[models]]` in the file.

"""
EXAMPLE = """

```toml
[[models]]
path = "~/models/Llama-3.1-8B-Instruct-F16.gguf"
target_size = "6GB"
max_degradation = 0.05
```
"""


def page() -> str:
    """Return the whole page."""
    sys.path.insert(0, str(ROOT))
    from pydantic import BaseModel

    from daemon.settings import ModelEntry, Settings, type_words

    def table(model: type[BaseModel], skipped: str = "") -> str:
        rows = ["| setting | default | type | what |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            if name == skipped:
                continue
            default = "see below" if name == "state_dir" else _shown(field.get_default())
            rows.append(f"| `{name}` | {default} | {type_words(field.annotation)} | {field.description} |")
        return "\n".join(rows)

    return HEAD + table(Settings, "models") + MODELS + table(ModelEntry) + EXAMPLE


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "" or "PydanticUndefined" in repr(value):
        return "not set"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/settings.md is stale: run `make docs`.")
    else:
        PAGE.write_text(text, encoding="utf-8")
