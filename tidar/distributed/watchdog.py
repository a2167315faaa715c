"""Ends a run in which a rank hangs or has died, and names that rank."""

import json
import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from tidar.distributed.world import World

# seconds between looks, and those that a rank has to say why before others pull the launcher down on it
POLL, GRACE = 0.5, 2.0


class Watchdog:
    """A thread on each rank that shares through the store how far its rank has come.

    All ranks pass the same places in the same order, so where none goes on, the ones that have passed the fewest are
    those that the others wait for. Collectives alone would end the run too, but cannot say whose fault it is.
    """

    def __init__(self, world: World, patience: float):
        """patience: seconds without progress after which the process ends."""
        self.rank, self.size = world.rank, world.size
        self.passed = 0
        self.progress = (0, "starting", patience, time.monotonic())
        if world.size == 1:
            return
        # a connection of its own: the other is held by whoever waits at it
        self.store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
        self._share()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def passes(self, place: str, patience: float) -> None:
        """Says where this rank is, and how many seconds it may stay."""
        self.passed += 1
        self.progress = (self.passed, place, patience, time.monotonic())

    def stop(self) -> None:
        if self.size > 1:
            self.stopped.set()
            self.thread.join()

    def _share(self) -> None:
        passed, place, *_ = self.progress
        self.store.set(str(self.rank), json.dumps([passed, place]))

    def _watch(self) -> None:
        shared = None
        while not self.stopped.wait(POLL):
            passed, _, patience, since = self.progress
            try:
                if passed != shared:
                    self._share()
                    shared = passed
                # early enough to have ended when the patience has
                if time.monotonic() - since > patience - 2 * POLL:
                    self._end(patience)
            except dist.DistError:
                # the store is gone: with the launcher, or with rank 0, whose end the others learn from collectives
                return

    def _end(self, patience: float) -> None:
        everyone = [json.loads(text) for text in self.store.multi_get([str(rank) for rank in range(self.size)])]
        fewest = min(passed for passed, _ in everyone)
        behind = [rank for rank, (passed, _) in enumerate(everyone) if passed == fewest]
        if self.store.add("told", 1) == 1:
            place = everyone[behind[0]][1]
            who = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind[:8]))}"
            if len(behind) > 8:
                who += f" and {len(behind) - 8} more"
            what = f"{who} did not get past {place}, and the others wait"
            if len(behind) == self.size:
                what = f"all ranks wait at {place}: a device or the network hangs"
            print(f"error: no progress for {patience:.0f} s: {what}", file=sys.stderr, flush=True)
        if self.rank in behind:
            print(f"rank {self.rank} hangs here:", file=sys.stderr)
            traceback.print_stack(sys._current_frames()[threading.main_thread().ident])
            sys.stderr.flush()
        else:
            time.sleep(GRACE)
        os._exit(1)
