"""Ends a run in which a rank hangs or has died, and names that rank."""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from tidar.distributed.world import World

POLL = 0.5  # seconds between reports to the store
LOOKS = 4  # reports without progress before a run is ended
GRACE = 2.0  # seconds for the ranks at fault to print where they hang, before the launcher ends them too
STORE_TIMEOUT = 10  # seconds for the store to answer


class Watchdog:
    """A thread on each rank that reports the heartbeats of its rank to the store.

    All ranks have the same heartbeats in the same order. Where all have stopped, the ranks at fault are those that have
    not started, or whose thread is silent, or else those with the fewest heartbeats that do not wait in a collective.
    Timeouts of collectives would end the run too, but cannot say whose fault it is.
    """

    def __init__(self, world: World, abort: Callable[[str], object]):
        """abort: gets the reason before this process ends; called by the watching thread."""
        self.abort = abort
        self.rank, self.size = world.rank, world.size
        # number, phase, timeout and time of the last heartbeat
        self.last = (0, "the start", math.inf, time.monotonic())
        self.looks = 0
        self.stopped = threading.Event()
        if world.size > 1:
            # a connection of its own: a rank that waits holds the other one
            default_store = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore("watchdog", default_store.clone())  # type: ignore[attr-defined]
            self.store.set_timeout(timedelta(seconds=STORE_TIMEOUT))

    @contextmanager
    def watching(self, timeout: float) -> Iterator[None]:
        """Watches until the context exits. Exit it only when all ranks are done: a silent rank counts as dead.

        timeout: seconds until the first heartbeat.
        """
        self.heartbeat("the start", timeout)
        if self.size == 1:
            yield
            return
        self._share()  # so that a rank that hangs at once has been seen
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            thread.join()

    def heartbeat(self, phase: str, timeout: float) -> None:
        """Reports what this rank does. Unless its next heartbeat comes within `timeout` seconds, all processes end."""
        self.last = (self.last[0] + 1, phase, timeout, time.monotonic())

    def _share(self) -> None:
        self.looks += 1
        beats, phase, *_ = self.last
        waits = _main_frame().f_code.co_filename.endswith("distributed_c10d.py")
        process = (socket.gethostname(), os.getpid())
        self.store.set(str(self.rank), json.dumps([self.looks, beats, waits, phase, process]))

    def _all_shared(self) -> dict[int, list]:
        """The last shared entry of each rank that has started, by rank."""
        ranks = [rank for rank in range(self.size) if self.store.check([str(rank)])]
        return dict(zip(ranks, map(json.loads, self.store.multi_get([str(rank) for rank in ranks]))))

    def _watch(self) -> None:
        while not self.stopped.wait(POLL):
            _, _, timeout, since = self.last
            # early enough for the process to have ended at the timeout
            is_late = time.monotonic() - since > timeout - (LOOKS + 1) * POLL
            try:
                self._share()
                if is_late:
                    self._end_without_progress(timeout)
            except dist.DistError:
                if is_late:
                    self._end(
                        f"error: no progress for {timeout:.0f} s, and no answer from the launcher's or rank 0's store"
                    )

    def _end_without_progress(self, timeout: float) -> None:
        """Ends the process and names the ranks at fault, unless some rank still makes progress."""
        before = self._all_shared()
        for _ in range(LOOKS):
            time.sleep(POLL)
            self._share()
        after = self._all_shared()
        if self.stopped.is_set() or any(after[rank][1] != before.get(rank, after[rank])[1] for rank in after):
            return
        absent = [rank for rank in range(self.size) if rank not in after]
        silent = [rank for rank in before if before[rank][0] == after[rank][0]]
        fewest = min(beats for _, beats, *_ in after.values())
        behind = [rank for rank in after if after[rank][1] == fewest]
        at_fault = absent or silent or [rank for rank in behind if not after[rank][2]] or behind
        who = f"rank{'s' if len(at_fault) > 1 else ''} {', '.join(map(str, at_fault[:8]))}"
        who += f" and {len(at_fault) - 8} more" if len(at_fault) > 8 else ""
        if absent:
            what = f"{who} did not start training"
        elif len(at_fault) == self.size:
            what = f"all ranks wait at {after[0][3]}: a device or the network hangs"
        elif silent:
            what = f"{who} sent no heartbeat, last seen at {after[at_fault[0]][3]}"
        else:
            what = f"{who} did not get past {after[at_fault[0]][3]}, and the others wait"
        is_printed = self.store.add("printed", 1) > 1
        if self.rank not in at_fault:
            for host, pid in (after[rank][4] for rank in silent):
                if host == socket.gethostname():
                    os.kill(pid, signal.SIGKILL)  # the launcher's SIGTERM does not end a process that is stopped
        message = "" if is_printed else f"error: no progress for {timeout:.0f} s: {what}"
        self._end(message, is_at_fault=self.rank in at_fault)

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
    """Frame of this process's main thread."""
    return sys._current_frames()[threading.main_thread().ident or 0]
