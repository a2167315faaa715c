"""Ends a run in which a rank hangs or has died, and names that rank."""

import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from tidar.distributed.world import World

# seconds between looks; looks with which a run without progress is judged; seconds that the ranks at fault have to say
# where they hang before the others end and the launcher ends all; and that the store has to answer
POLL, LOOKS, GRACE, STORE_TIMEOUT = 0.5, 4, 2.0, 10


class Watchdog:
    """A thread on each rank that shares through the store how far its rank has come.

    All ranks pass the same places in the same order. Where none goes on, those are at fault whose thread is silent, or
    else that have passed the fewest places, without those that wait in a collective. Collectives alone would end the
    run too, but cannot say whose fault it is.
    """

    def __init__(self, world: World, patience: float):
        """patience: seconds without progress with which all processes end."""
        self.rank, self.size = world.rank, world.size
        self.progress = (0, "the start", patience, time.monotonic())
        if world.size == 1:
            return
        # a connection of its own: the other is held by whoever waits at it
        self.store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
        self.store.set_timeout(timedelta(seconds=STORE_TIMEOUT))
        self.looks = 0
        self._share()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def passes(self, place: str, patience: float) -> None:
        """Says where this rank is, and how many seconds it may stay."""
        self.progress = (self.progress[0] + 1, place, patience, time.monotonic())

    def stop(self) -> None:
        if self.size > 1:
            self.stopped.set()
            self.thread.join()

    def _share(self) -> None:
        self.looks += 1
        passed, place, *_ = self.progress
        waits = f"torch{os.sep}distributed" in _main_frame().f_code.co_filename
        self.store.set(str(self.rank), json.dumps([self.looks, passed, waits, place]))

    def _all_shared(self) -> list[tuple[int, int, bool, str]]:
        return [json.loads(text) for text in self.store.multi_get([str(rank) for rank in range(self.size)])]

    def _watch(self) -> None:
        try:
            while not self.stopped.wait(POLL):
                self._share()
                _, _, patience, since = self.progress
                # early enough to have ended when the patience has
                if time.monotonic() - since > patience - (LOOKS + 1) * POLL:
                    self._judge(patience)
        except dist.DistError:
            # the store is gone: with the launcher, or with rank 0, whose end the others learn from collectives
            return

    def _judge(self, patience: float) -> None:
        """Ends the process, unless there is progress after all."""
        passed = self.progress[0]
        try:
            before = self._all_shared()
            for _ in range(LOOKS):
                time.sleep(POLL)
                self._share()
            after = self._all_shared()
        except dist.DistError:
            print(f"error: no progress for {patience:.0f} s, and no answer from rank 0's store", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        if self.progress[0] != passed or self.stopped.is_set():
            return
        silent = [rank for rank in range(self.size) if before[rank][0] == after[rank][0]]
        fewest = min(passed for _, passed, _, _ in after)
        behind = [rank for rank in range(self.size) if after[rank][1] == fewest]
        at_fault = silent or [rank for rank in behind if not after[rank][2]] or behind
        if self.store.add("told", 1) == 1:
            who = f"rank{'s' if len(at_fault) > 1 else ''} {', '.join(map(str, at_fault[:8]))}"
            who += f" and {len(at_fault) - 8} more" if len(at_fault) > 8 else ""
            what = f"{who} did not get past {after[at_fault[0]][3]}, and the others wait"
            if len(at_fault) == self.size:
                what = f"all ranks wait at {after[0][3]}: a device or the network hangs"
            elif silent:
                what = f"{who} gave no sign of life since {after[at_fault[0]][3]}"
            print(f"error: no progress for {patience:.0f} s: {what}", file=sys.stderr, flush=True)
        if self.rank in at_fault:
            print(f"rank {self.rank} hangs here:", file=sys.stderr)
            traceback.print_stack(_main_frame())
            sys.stderr.flush()
        else:
            time.sleep(GRACE)
        os._exit(1)


def _main_frame() -> FrameType:
    """What the process's main thread is doing."""
    return sys._current_frames()[threading.main_thread().ident]
