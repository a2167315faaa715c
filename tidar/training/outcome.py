"""How a run has ended, in a file: the launcher hides the exit codes of its processes."""

import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

NAME = "outcome.json"


class Outcome:
    """outcome.json of a run's folder, whole at any time.

    Its "outcome" is "running", "finished" (all steps are done), "stopped" (asked to, by a signal or the clock) or
    "failed"; "reason" says why. A run that is killed leaves "running".
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, **progress: Any) -> None:
        """progress: how far the run has come, for the file."""
        self._write("running", progress)

    def end(self, outcome: str, **progress: Any) -> None:
        """Any rank and thread may tell of an end; the first one counts."""
        try:
            is_first = json.loads((self.folder / NAME).read_text(encoding="utf-8"))["outcome"] == "running"
        except (OSError, ValueError, KeyError, TypeError):
            is_first = True
        if is_first:
            self._write(outcome, progress)

    def _write(self, outcome: str, progress: dict[str, Any]) -> None:
        content = {"outcome": outcome, **progress, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        content |= {"process": os.getpid(), "host": socket.gethostname()}
        partial = self.folder / f"{NAME}.{os.getpid()}"
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / NAME)
        except OSError:
            partial.unlink(missing_ok=True)  # a full disk: what ends the run is told on the console
