"""Ends a run in which a rank hangs or has died, and names that rank."""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from tidar.distributed.world import World

# seconds between looks; looks with which a run without progress is judged; seconds that the ranks at fault have to say
# where they hang before the others end and the launcher ends all; and that the store has to answer
POLL, LOOKS, GRACE, STORE_TIMEOUT = 0.5, 4, 2.0, 10


class Watchdog:
    """A thread on each rank that shares through the store how far its rank has come.

    All ranks pass the same places in the same order. Where none goes on, those are at fault that are not there yet, or
    whose thread is silent, or else that have passed the fewest places, without those that wait in a collective.
    Collectives alone would end the run too, but cannot say whose fault it is.
    """

    def __init__(self, world: World, patience: float, abort: Callable[[str], None]):
        """patience: seconds without progress with which all processes end. abort: told why before this one does."""
        self.abort = abort
        self.rank, self.size = world.rank, world.size
        self.progress = (0, "the start", patience, time.monotonic())
        if world.size == 1:
            return
        # a connection of its own: the other is held by whoever waits at it
        self.store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
        self.store.set_timeout(timedelta(seconds=STORE_TIMEOUT))
        self.looks = 0
        self._share()  # a rank that stops at once has been seen
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def passes(self, place: str, patience: float) -> None:
        """Says where this rank is, and how many seconds it may stay."""
        self.progress = (self.progress[0] + 1, place, patience, time.monotonic())

    def stop(self) -> None:
        """When all ranks are done: one whose thread is silent is held for dead."""
        if self.size > 1:
            self.stopped.set()
            self.thread.join()

    def _share(self) -> None:
        self.looks += 1
        passed, place, *_ = self.progress
        waits = _main_frame().f_code.co_filename.endswith("distributed_c10d.py")
        process = (socket.gethostname(), os.getpid())
        self.store.set(str(self.rank), json.dumps([self.looks, passed, waits, place, process]))

    def _all_shared(self) -> dict[int, list]:
        """By rank, what those have shared that have come so far."""
        ranks = [rank for rank in range(self.size) if self.store.check([str(rank)])]
        return dict(zip(ranks, map(json.loads, self.store.multi_get([str(rank) for rank in ranks]))))

    def _watch(self) -> None:
        while not self.stopped.wait(POLL):
            _, _, patience, since = self.progress
            # early enough to have ended when the patience has
            out_of_patience = time.monotonic() - since > patience - (LOOKS + 1) * POLL
            try:
                self._share()
                if out_of_patience:
                    self._judge(patience)
            except dist.DistError:
                if out_of_patience:
                    self._end(
                        f"error: no progress for {patience:.0f} s, and no answer from the launcher's or rank 0's store"
                    )

    def _judge(self, patience: float) -> None:
        """Ends the process, unless there is progress after all."""
        before = self._all_shared()
        for _ in range(LOOKS):
            time.sleep(POLL)
            self._share()
        after = self._all_shared()
        if self.stopped.is_set() or any(after[rank][1] != before.get(rank, after[rank])[1] for rank in after):
            return
        absent = [rank for rank in range(self.size) if rank not in after]
        silent = [rank for rank in before if before[rank][0] == after[rank][0]]
        fewest = min(passed for _, passed, *_ in after.values())
        behind = [rank for rank in after if after[rank][1] == fewest]
        at_fault = absent or silent or [rank for rank in behind if not after[rank][2]] or behind
        who = f"rank{'s' if len(at_fault) > 1 else ''} {', '.join(map(str, at_fault[:8]))}"
        who += f" and {len(at_fault) - 8} more" if len(at_fault) > 8 else ""
        if absent:
            what = f"{who} did not come as far as training"
        elif len(at_fault) == self.size:
            what = f"all ranks wait at {after[0][3]}: a device or the network hangs"
        elif silent:
            what = f"{who} gives no sign of life, last seen at {after[at_fault[0]][3]}"
        else:
            what = f"{who} did not get past {after[at_fault[0]][3]}, and the others wait"
        told = self.store.add("told", 1) > 1
        if self.rank not in at_fault:
            for host, pid in (after[rank][4] for rank in silent):
                if host == socket.gethostname():
                    os.kill(pid, signal.SIGKILL)  # a process that is stopped does not heed the launcher
        self._end("" if told else f"error: no progress for {patience:.0f} s: {what}", is_at_fault=self.rank in at_fault)

    def _end(self, message: str, is_at_fault: bool = False) -> None:
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
        if message:
            self.abort(message)
        if is_at_fault:
            print(f"rank {self.rank} hangs here:", file=sys.stderr)
            traceback.print_stack(_main_frame())
            sys.stderr.flush()
        else:
            time.sleep(GRACE)
        os._exit(1)


def _main_frame() -> FrameType:
    """What the process's main thread is doing."""
    return sys._current_frames()[threading.main_thread().ident]
