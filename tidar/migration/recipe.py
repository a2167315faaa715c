"""The TOML file that the keys are converted to."""

import textwrap
from typing import Any

from tidar.config import Config, printable, set_option, to_toml
from tidar.migration.keys import Keys, shown


class Recipe:
    """A TOML file in the making: options, their comments, keys that do not become options, and warnings."""

    def __init__(self):
        self.config = Config()
        self.comments: dict[str, str] = {}
        self.unused: dict[str, list[str]] = {}
        self.warnings: list[str] = []

    def set(self, name: str, value: Any, *comments: str, origin: str = "") -> None:
        """Raises UserError for a value out of the option's range, with `origin` before it."""
        set_option(self.config, name, value, origin)
        self.comments[name] = "; ".join(comments)

    def convert(self, keys: Keys, key: str, name: str, value: Any, *comments: str, otherwise: Any = None) -> None:
        """Sets the option that a key stands for. otherwise: named in the comment as the default, if not `value`."""
        said = keys.said(key, value if otherwise is None else otherwise)
        origin = f"{keys.file}: {keys.name(key)} = {shown(keys.values.get(key))}: becomes "
        self.set(name, value, said, *comments, origin=origin)

    def carry(self, keys: Keys, key: str, kind: type, name: str, default: Any, *comments: str) -> None:
        """Converts a key whose value is taken as it is."""
        self.convert(keys, key, name, keys.take(key, kind, default), *comments)

    def leave(self, text: str, reason: str) -> None:
        """Handles a key that does not become an option."""
        self.unused.setdefault(reason, []).append(text)

    def leave_rest(self, keys: Keys, reasons: dict[tuple[str, ...], str]) -> None:
        """Handles the keys that have not become options."""
        for key, value in keys.values.items():
            path = (*keys.path, key)
            reason = reasons.get((*keys.path, key.removeprefix("stage3_")), reasons.get(keys.path))
            if path in keys.handled:
                if isinstance(value, dict):
                    self.leave_rest(Keys(keys.file, value, path, keys.handled), reasons)
            elif reason:
                self.leave(keys.said(key), reason)
            else:
                self.leave(keys.said(key), "not known, so ignored")
                self.warnings.append(f"{keys.file}: {keys.name(key)} = {shown(value)}: not known, so ignored")

    def toml(self, header: list[str]) -> str:
        lines, section = [comment(text) for text in header], ""
        for line in to_toml(self.config).split("\n"):
            section = line if line.startswith("[") else section
            name = f"{section[1:-1]}.{line.partition(' = ')[0]}"
            if name in self.comments:
                lines += [] if section in lines else ["", section]
                lines += [comment(self.comments[name])] if self.comments[name] else []
                lines.append(line)
        lines += ["", "# Keys that do not become options, and why:"]
        lines += [comment(f"{', '.join(texts)}: {reason}") for reason, texts in self.unused.items()]
        return "\n".join(lines) + "\n"


def comment(text: str) -> str:
    """The text, which may hold anything, as comment lines of TOML."""
    lines = textwrap.wrap(printable(text), width=117, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"# {line}" for line in lines)
