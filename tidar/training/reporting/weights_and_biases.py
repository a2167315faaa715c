"""Weights & Biases: the scalars and texts of TensorBoard, and the options of the run (extra wandb)."""

import dataclasses
import html
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidar.config import Config, first_line
from tidar.config.files import open_regular, parse_json, write_atomically
from tidar.config.packages import check_version

STATE = "wandb.json"  # of the run's folder: its id, and the last step of each scalar and text
# first version whose login() has an option not to ask at a terminal
FIRST_WANDB = (0, 30)


def check_wandb(config: Config) -> None:
    """Raises UserError where metrics.enable_wandb is set, and wandb is not installed or too old."""
    if config.metrics.enable_wandb:
        check_version("metrics.enable_wandb = true", "wandb", FIRST_WANDB, "wandb")


class WandbRun:
    """A run on Weights & Biases, the same one each time that the run in `folder` is resumed.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE and the others are wandb's own; without them the project is
    "tidar" and the name that of the folder. Steps that a resumed run repeats keep their first values: wandb cannot
    take a value back. A failure in wandb is logged once, and the run continues without it.
    """

    def __init__(self, folder: Path, config: Config, log: Callable[[str], None]):
        self.folder, self.config, self.log = folder, config, log
        self.run: Any = None
        self.last: dict[str, int] = {}

    def open(self) -> None:
        try:
            self._open()
        except Exception as error:  # of a library, and of the network
            self._fail(error)

    def _open(self) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False):  # wandb.init would ask at a terminal
            return self._fail("no API key: set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline")
        run_id, self.last = self._read_state()
        self.run = wandb.init(
            id=run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "tidar"),
            name=os.environ.get("WANDB_NAME", self.folder.resolve().name),
            dir=str(self.folder),
            config=dataclasses.asdict(self.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # wandb's own steps cannot be repeated, so the run's steps are a separate axis
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self._write_state()

    def write(self, step: int, values: dict[str, float | str]) -> None:
        """Scalars, and texts in Markdown, by name. Values of steps that were written before are dropped."""
        values = {name: value for name, value in values.items() if step > self.last.get(name, -1)}
        if not self.run or not values:
            return
        try:
            import wandb

            shown = {n: wandb.Html(_as_html(value)) if isinstance(value, str) else value for n, value in values.items()}
            self.run.log({"step": step} | shown)
            self.last |= dict.fromkeys(values, step)
            self._write_state()
        except Exception as error:
            self._fail(error)

    def close(self, failed: bool) -> None:
        if self.run:
            try:
                self.run.finish(exit_code=int(failed))
            except Exception as error:
                self._fail(error)

    def _fail(self, reason: Exception | str) -> None:
        self.run = None
        text = reason if isinstance(reason, str) else first_line(reason)
        self.log(f"warning: metrics.enable_wandb = true: the run continues without Weights & Biases ({text})")

    def _read_state(self) -> tuple[str, dict[str, int]]:
        try:
            with open_regular(self.folder / STATE) as file:
                state = parse_json(file.read())
            return str(state["id"]), {str(name): int(step) for name, step in state["last"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), {}

    def _write_state(self) -> None:
        write_atomically(self.folder / STATE, json.dumps({"id": self.run.id, "last": self.last}))


def _as_html(text: str) -> str:
    return f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
