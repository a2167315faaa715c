"""TensorBoard's event files: scalars by step."""

import os
import re
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from tidar.config.files import create_file

NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFile:
    """A new event file in a folder of them, which TensorBoard reads after all the others.

    TensorBoard reads event files in the order of their names, which begin with the time, and drops what it has read of
    a step and later ones when a file begins at that step. A file named by a clock that was set back would be read first
    and dropped. So the time in the name is at least one second after the newest one in the folder.
    """

    def __init__(self, folder: Path, first_step: int):
        """first_step: other files' scalars of this step and later ones are superseded. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        times = [int(match[1]) for path in folder.iterdir() if (match := NAME.match(path.name))]
        started = max([int(time.time()), *(number + 1 for number in times)])
        name = f"events.out.tfevents.{started:010}.{socket.gethostname()}.{os.getpid()}.0"
        self.records = RecordWriter(create_file(folder / name))
        self._add(Event(step=first_step, file_version="brain.Event:2"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self.records.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(Event(step=step, summary=Summary(value=values)))
        self.records.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """text: Markdown."""
        summary = text_pb(name, text)
        self._add(Event(step=step, summary=summary))
        self.records.flush()

    def close(self) -> None:
        self.records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
