"""Finds an interpreter that has what pyproject.toml asks for, or makes one in .venv, and prints its path.

Needs nothing but Python: run_train.sh and tests/run.sh begin with it.
"""

import hashlib
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "tidar-installed")


def main():
    if sys.version_info < (3, 10):
        sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}: must be 3.10 or later; set PYTHON")
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = file.read()
    digest = hashlib.sha256(project).hexdigest()
    if this_interpreter_suffices(project.decode()):
        print(sys.executable)
        return
    if not venv_is_ready(digest):
        make_venv(digest)
    print(VENV_PYTHON)


def this_interpreter_suffices(project: str) -> bool:
    """Whether the packages that the project and its tests want are installed here, in versions that it admits."""
    try:
        import importlib.metadata

        from packaging.requirements import Requirement

        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        return False
    table = tomllib.loads(project)["project"]
    for text in table["dependencies"] + table["optional-dependencies"]["test"]:
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


def venv_is_ready(digest: str) -> bool:
    try:
        with open(STAMP) as file:
            return file.read() == digest
    except OSError:
        return False


def make_venv(digest: str) -> None:
    print(f"setting up {VENV}, once", file=sys.stderr)
    steps = [
        ([sys.executable, "-m", "venv", VENV], "make a virtual environment (on Debian: apt install python3-venv)"),
        ([VENV_PYTHON, "-m", "pip", "install", "--quiet", "--editable", ROOT + "[test]"], "install the dependencies"),
    ]
    for command, purpose in steps:
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            sys.exit(f"error: could not {purpose}: {' '.join(command)}")
    with open(STAMP, "w") as file:
        file.write(digest)


if __name__ == "__main__":
    main()
