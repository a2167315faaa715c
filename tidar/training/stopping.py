"""Requests to stop before the last step: signals, and the clock."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from tidar.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# a scheduler may signal the launcher and its processes at once, and the launcher forwards it: within so many seconds
# of the first signal, another one is the same
SAME_SIGNAL = 0.5
# the pipe's last byte, no signal: the end of the pipe would not be seen, because forked processes hold it open
LAST = 0


class Stopped(Exception):
    """All ranks have agreed to stop, here. The text says why."""


class StopRequests:
    """Requests to stop before the last step, and the agreement of all ranks on where they stop.

    The first SIGTERM or SIGUSR1 on any rank is a request, a second one ends its process at once; so does the first one
    before `begin`, when there is nothing to save, and a SIGTERM that comes because another rank has died. The end of
    checkpoint.max_wall_minutes is a request too, and callers can add others.
    """

    def __init__(self, world: World, group: dist.ProcessGroup, deadline: float, abort: Callable[[str], object]):
        """Signals are caught from here on, and acted on after `listen`.

        group: of all ranks, on the CPU. deadline: of time.monotonic(). abort: gets the reason before the
        process ends at once; called by the listening thread.
        """
        while _current:
            _current[-1].close()
        self.trains = False
        self.rank = world.rank
        self.group = group
        self.deadline = deadline
        self.abort = abort
        self.signal: int | None = None
        self.vote: tuple[dist.Work, torch.Tensor] | None = None
        mine = (socket.gethostname(), os.getpid(), world.rank)
        processes: list = [None] * world.size
        dist.all_gather_object(processes, mine, group=group)
        self.neighbours = {pid: rank for host, pid, rank in processes if host == mine[0] and rank != world.rank}
        self.parent = os.getppid()
        # signals reach the pipe even while the main thread waits in a collective
        self.reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
        self.thread: threading.Thread | None = None
        _current.append(self)

    def listen(self) -> None:
        """Acts on signals, including those that came since this object was created."""
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()

    def begin(self) -> None:
        """From here on `agreed` or `check` is called between batches."""
        self.trains = True

    def close(self) -> None:
        """Restores the signals' earlier handlers."""
        if self not in _current:
            return
        _current.remove(self)
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.thread:
            os.write(self.pipe, bytes([LAST]))
            self.thread.join()
        else:
            os.close(self.reader)
        os.close(self.pipe)

    def agreed(self, other: bool = False) -> str | None:
        """Why all ranks stop now, the same on all of them; None where nothing was requested. All ranks call it.

        other: whether this rank requests to stop for another reason. A request counts at the next call, so that no rank
        waits for the slowest in the meantime.
        """
        reason = self._result()
        self._vote(other)
        return reason

    def check(self) -> None:
        """Raises Stopped on all ranks where one of them has a request by now. All ranks call it, and wait here."""
        reason = self._result()
        if not reason:
            self._vote()
            reason = self._result()
        if reason:
            raise Stopped(reason)

    def _vote(self, other: bool = False) -> None:
        out_of_time = time.monotonic() > self.deadline
        votes = torch.tensor([self.signal or 0, out_of_time, other], dtype=torch.int)
        self.vote = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group, async_op=True), votes

    def _result(self) -> str | None:
        """Result of the last vote; None if there is none or its result was read before."""
        if not self.vote:
            return None
        (work, votes), self.vote = self.vote, None
        work.wait()
        number, clock, others = votes.tolist()
        if number:
            return signal.Signals(number).name
        return "checkpoint.max_wall_minutes" if clock else "an error" if others else None

    def _listen(self) -> None:
        received = 0.0
        with os.fdopen(self.reader, "rb", buffering=0) as reader:
            while (number := reader.read(1)[0]) != LAST:
                if number in SIGNALS and self.signal is None:
                    self._receive(number)
                    received = time.monotonic()
                elif number in SIGNALS and time.monotonic() - received > SAME_SIGNAL:
                    self._end(f"{signal.Signals(number).name} came again", 128 + number)

    def _receive(self, number: int) -> None:
        if number == signal.SIGTERM:
            # the launcher sends it to the rest when one of its processes has died
            dead = [rank for pid, rank in self.neighbours.items() if not _is_alive(pid)]
            if dead:
                self._end(f"rank {dead[0]} has died", 1)
        self.signal = number
        if not self.trains:
            self._end(f"{signal.Signals(number).name} before the first step", 128 + number)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch_launcher, name="launcher", daemon=True).start()

    def _watch_launcher(self) -> None:
        """A second signal to torchrun ends it alone."""
        while os.getppid() == self.parent:
            time.sleep(0.2)
        self._end("the launcher has ended", 1)

    def _end(self, reason: str, code: int) -> None:
        self.abort(reason)
        print(f"error: {reason}: rank {self.rank} ends at once", file=sys.stderr, flush=True)
        os._exit(code)


_current: list[StopRequests] = []


def _forget_in_child() -> None:
    """A process forked from a rank shares its pipe, but the signals that it gets are not the rank's."""
    if _current:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
