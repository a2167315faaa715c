"""Optional packages."""

import importlib.metadata
from pathlib import Path

from tidar.config.errors import UserError

ROOT = Path(__file__).parents[2]


def install(extra: str) -> str:
    """The command that installs an extra: that of the checkout this package lies in, or of the installed package."""
    if (ROOT / "pyproject.toml").is_file():
        return f"pip install -e '{'.' if Path.cwd() == ROOT else ROOT}[{extra}]'"
    return f"pip install 'tidar[{extra}]'"


def check_version(option: str, package: str, first: tuple[int, ...], extra: str) -> None:
    """Raises UserError where a package of `extra`, which an option needs, is missing or older than version `first`."""
    needed = f"{option}: needs {package} {'.'.join(map(str, first))} or later: {install(extra)}"
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(needed) from None
    if tuple(int(part) for part in installed.split(".")[: len(first)] if part.isdecimal()) < first:
        raise UserError(f"{needed}; {installed} is installed")
