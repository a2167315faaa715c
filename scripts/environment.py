"""Finds an interpreter that has what pyproject.toml asks for, or makes one in .venv, and prints its path.

python3 scripts/environment.py [EXTRA ...]: with the packages of these extras too. Needs Python alone: run_train.sh,
tests/run.sh and .ci/run begin with it.
"""

from __future__ import annotations  # older versions of Python must come to the message that says what they are

import fcntl
import hashlib
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT = os.path.join(ROOT, "pyproject.toml")
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "tidar-stamp")


def main() -> None:
    extras = sys.argv[1:]
    if sys.version_info < (3, 10):
        sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}: must be 3.10 or later; set PYTHON")
    if this_interpreter_suffices(PROJECT, extras):
        print(sys.executable)
        return
    if not venv_has(extras):
        # two nodes, or two terminals, may come here at the same time
        with open(os.path.join(ROOT, ".venv.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not venv_has(extras):
                make_venv(extras)
    print(VENV_PYTHON)


def this_interpreter_suffices(project: str, extras: list[str]) -> bool:
    """Whether the packages that pyproject.toml and these extras want are installed here, in versions that it admits."""
    try:
        import importlib.metadata

        from packaging.requirements import Requirement

        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        return False
    with open(project, "rb") as file:
        table = tomllib.load(file)["project"]
    for text in sum([table["optional-dependencies"][extra] for extra in extras], table["dependencies"]):
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            return False
        if not requirement.specifier.contains(version, prereleases=True):
            return False
    return True


def made_from() -> str:
    """What an environment is made from; the first line of its stamp."""
    with open(PROJECT, "rb") as file:
        project = hashlib.sha256(file.read()).hexdigest()
    return f"{project} {' '.join(sys.version.split())} {os.path.realpath(sys.executable)}"


def installed_extras() -> set[str]:
    """The extras in .venv, "test" always among them; none where .venv is not whole or made from something else."""
    try:
        with open(STAMP) as file:
            first, *extras = file.read().splitlines()
    except (OSError, ValueError):
        return set()
    return set(extras) if first == made_from() and os.access(VENV_PYTHON, os.X_OK) else set()


def venv_has(extras: list[str]) -> bool:
    return {"test", *extras} <= installed_extras()


def make_venv(extras: list[str]) -> None:
    """Makes .venv, or adds the extras to the one that is there."""
    installed = installed_extras()
    if not installed:
        print(f"setting up {VENV}, once", file=sys.stderr)
        run("make .venv (on Debian: apt install python3-venv)", [sys.executable, "-m", "venv", "--clear", VENV])
    extras = sorted({"test", *extras} | installed)
    project = f"{ROOT}[{','.join(extras)}]"
    run("install the dependencies", [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--editable", project])
    with open(STAMP, "w") as file:
        file.write("\n".join([made_from(), *extras]))


def run(purpose: str, command: list[str]) -> None:
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        sys.exit(f"error: could not {purpose}: {' '.join(command)}")


if __name__ == "__main__":
    main()
