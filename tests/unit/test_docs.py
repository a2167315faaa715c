"""The pages for users say what is true of the code."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_options_is_current():
    command = [sys.executable, "scripts/options_page.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def test_the_readme_is_short_and_links_exist():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
