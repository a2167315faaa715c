"""Optional packages."""

import importlib.metadata

from tidar.config.errors import UserError


def check_version(option: str, package: str, first: tuple[int, ...], how: str) -> None:
    """Raises UserError where a package that an option needs is not installed, or is older than version `first`.

    how: to install it, the end of the message.
    """
    needed = f"{option}: needs {package} {'.'.join(map(str, first))} or later{how}"
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(needed) from None
    if tuple(int(part) for part in installed.split(".")[: len(first)] if part.isdecimal()) < first:
        raise UserError(f"{needed}; {installed} is installed")
