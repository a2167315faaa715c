"""Finds an interpreter that has what pyproject.toml asks for, or makes one in .venv, and prints its path.

python3 scripts/environment.py [EXTRA ...]: with the packages of these extras too. Needs Python alone: run_train.sh
and tests/run.sh begin with it.
"""

import fcntl
import hashlib
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT = os.path.join(ROOT, "pyproject.toml")
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")


def main():
    if sys.version_info < (3, 10):
        sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}: must be 3.10 or later; set PYTHON")
    if this_interpreter_suffices(PROJECT, sys.argv[1:]):
        print(sys.executable)
        return
    if not venv_is_ready():
        # two nodes, or two terminals, may come here at the same time
        with open(os.path.join(ROOT, ".venv.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not venv_is_ready():
                make_venv()
    print(VENV_PYTHON)


def this_interpreter_suffices(project: str, extras: list) -> bool:
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


def stamp() -> str:
    """What the environment was made from; written into it when it is whole."""
    with open(PROJECT, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() + f" {sys.version} {os.path.realpath(sys.executable)}"


def venv_is_ready() -> bool:
    try:
        with open(os.path.join(VENV, "tidar-stamp")) as file:
            return file.read() == stamp() and os.access(VENV_PYTHON, os.X_OK)
    except OSError:
        return False


def make_venv() -> None:
    print(f"setting up {VENV}, once", file=sys.stderr)
    steps = {
        "make .venv (on Debian: apt install python3-venv)": [sys.executable, "-m", "venv", "--clear", VENV],
        "install the dependencies": [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--editable", ROOT + "[test]"],
    }
    for purpose, command in steps.items():
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            sys.exit(f"error: could not {purpose}: {' '.join(command)}")
    with open(os.path.join(VENV, "tidar-stamp"), "w") as file:
        file.write(stamp())


if __name__ == "__main__":
    main()
