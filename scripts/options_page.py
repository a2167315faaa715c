"""Prints docs/options.md from the dataclasses of the options: python3 scripts/options_page.py > docs/options.md"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tidar.config import Config  # noqa: E402
from tidar.config.loading import describe_allowed, format_value  # noqa: E402

HEAD = """# Options

Every option stands in a TOML file under its section, or on the command line as `--section.option value`, which wins.
Names follow torchtitan where it has them. This page is generated: `python3 scripts/options_page.py > docs/options.md`.
"""


def page() -> str:
    lines = [HEAD]
    for name, section in vars(Config()).items():
        lines += [f"## [{name}]", "", section.__doc__, ""]
        lines += ["| option | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for field in dataclasses.fields(section):
            default = getattr(section, field.name)
            shown = "" if default == "" else f"`{format_value(default)}`"
            cells = f"`{field.name}`", shown, describe_allowed(field), field.metadata["help"]
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
