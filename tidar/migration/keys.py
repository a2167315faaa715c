"""JSON files of which every key must be handled."""

import json
import math
from typing import Any, NoReturn

from tidar.config import UserError, in_range, printable


def shown(value: Any, longest: int = 100) -> str:
    """The value as JSON, on one line of at most `longest` characters."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8, and so TOML, can hold: half of a surrogate pair is none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


class Keys:
    """The keys of a JSON file or of a section of it, and which of the file's keys were handled."""

    def __init__(self, file: str, values: dict, path: tuple[str, ...] = (), handled: set | None = None):
        self.file, self.values, self.path = printable(file), values, path
        self.handled = set() if handled is None else handled

    def name(self, key: str) -> str:
        return printable(".".join((*self.path, key)))

    def is_auto(self, key: str) -> bool:
        """Whether Hugging Face's Trainer was to fill the value in."""
        return self.values.get(key) == "auto"

    def take(self, key: str, kind: type, default: Any = None, minimum=None, maximum=None) -> Any:
        """The value; the default where it is not given, null or "auto". Raises UserError for any other value."""
        value = self.values.get(key)
        if value is None or (self.is_auto(key) and kind not in (str, dict)):
            return default
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)  # 1e4
        elif kind is float and type(value) is int and value.bit_length() < 1024:
            value = float(value)
        fits = is_text(value) if kind is str else type(value) is kind
        # finite, and of TOML's 64 bits
        fits = fits and not (kind is float and math.isinf(value)) and not (kind is int and abs(value) >= 2**63)
        if not fits or (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            words = {int: "integer", float: "number", bool: "true|false", str: "text", dict: "a section: {...}"}[kind]
            self.refuse(key, words + (f" {in_range(minimum, maximum)}" if minimum is not None else ""))
        return value

    def section(self, key: str) -> "Keys":
        """A section, whose keys are handled one by one."""
        self.handled.add((*self.path, key))
        return Keys(self.file, self.take(key, dict, {}), (*self.path, key), self.handled)

    def refuse(self, key: str, allowed: str) -> NoReturn:
        value = f" = {shown(self.values[key])}" if key in self.values else " is missing"
        raise UserError(f"{self.file}: {self.name(key)}{value}: must be {allowed}")

    def said(self, key: str, otherwise: Any = None) -> str:
        """The key and its value for a comment; marks the key as handled. otherwise: the default if it has no value."""
        self.handled.add((*self.path, key))
        if key not in self.values:
            text = f"{self.name(key)} is not given"
        else:
            text = f"{self.name(key)} = {shown(self.values[key], longest=10**6)}"
            text += ", which only Hugging Face's Trainer fills in" if self.is_auto(key) else ""
        if otherwise is None or not (self.values.get(key) is None or self.is_auto(key)):
            return text
        return f"{text}, so {otherwise if isinstance(otherwise, str) else shown(otherwise)}"


def read_json(path: str) -> dict:
    """A JSON file. Raises UserError where it cannot be read, is no object, holds a key twice, or NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice in " + ", ".join(shown(key) for key, _ in pairs))
        return dict(pairs)

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number of JSON")

    try:
        with open(path, encoding="utf-8-sig") as file:
            values = json.loads(file.read(), object_pairs_hook=once, parse_constant=refuse)
        shown(values)  # fails for what is nested too deeply
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)}: is not JSON: {printable(str(error))}") from None
    if not isinstance(values, dict):
        raise UserError(f"{printable(path)}: holds {shown(values)}: must hold an object: {{...}}")
    return values
