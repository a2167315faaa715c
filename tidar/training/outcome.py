"""How a run has ended, in a file: the launcher hides the exit codes of its processes."""

import json
import os
import socket
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tidar.config.files import open_regular, parse_json, write_atomically

NAME = "outcome.json"


class Outcome:
    """outcome.json of a run's folder, replaced atomically.

    Its "outcome" is "running", "finished" (all steps are done), "stopped" (by a signal or the clock) or "failed";
    "reason" says why. A run that is killed leaves "running".
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def begin(self, **progress: Any) -> None:
        """Writes "running". progress: further items for the file."""
        self._write("running", progress)

    def end(self, outcome: str, **progress: Any) -> bool:
        """Writes an end. Any rank and thread may call it; the first call counts. Returns whether it is this one."""
        try:
            with open_regular(self.path) as file:
                is_first = parse_json(file.read())["outcome"] == "running"
        except (OSError, ValueError, KeyError, TypeError):
            is_first = True
        if is_first:
            self._write(outcome, progress)
        return is_first

    def _write(self, outcome: str, progress: dict[str, Any]) -> None:
        content = {"outcome": outcome, **progress, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        content |= {"process": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):  # a full disk: the console has the error that ends the run
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")
