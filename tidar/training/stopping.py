"""Stopping before the last step: the signals of a scheduler, and the clock."""

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
# a scheduler may signal the launcher and its processes at once, and the launcher passes it on: what comes within so
# many seconds of the first signal is the same one
SAME_SIGNAL = 0.5
# what no signal is: the pipe's last byte. Its end would not be seen, as processes that were forked hold it open
LAST = 0


class StopRequests:
    """What asks the ranks of a run to stop, and the step at which all of them do.

    The first SIGTERM or SIGUSR1 on any rank asks, a second one ends its process at once; so does the first one before
    `begin`, when there is nothing to save, and a SIGTERM that comes because another rank has died.
    checkpoint.max_wall_minutes asks when it is over, and so does whatever the caller adds.
    """

    def __init__(self, world: World, group: dist.ProcessGroup, deadline: float | None, abort: Callable[[str], None]):
        """group: of all ranks, on the CPU. deadline: of time.monotonic(), None for none. abort: told why before the
        process ends; any thread may call it.
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
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self.thread.start()
        _current.append(self)

    def begin(self) -> None:
        """From here on `agreed` is called."""
        self.trains = True

    def close(self) -> None:
        """Signals do again what they did before."""
        if self not in _current:
            return
        _current.remove(self)
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.write(self.pipe, bytes([LAST]))
        self.thread.join()
        os.close(self.pipe)

    def agreed(self, other: bool) -> str | None:
        """Why all ranks stop now, the same on all of them; None where they go on. All ranks call it after each step.

        other: whether this rank wants to stop for another reason. What a rank wants counts a step later, so that
        nobody waits for the slowest in the meantime.
        """
        reason = None
        if self.vote:
            work, votes = self.vote
            work.wait()
            number, clock, others = votes.tolist()
            if number:
                reason = signal.Signals(number).name
            elif clock:
                reason = "checkpoint.max_wall_minutes"
            elif others:
                reason = "an error"
        out_of_time = self.deadline is not None and time.monotonic() > self.deadline
        votes = torch.tensor([self.signal or 0, out_of_time, other], dtype=torch.int)
        self.vote = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group, async_op=True), votes
        return reason

    def _listen(self, pipe: int) -> None:
        received = 0.0
        with os.fdopen(pipe, "rb", buffering=0) as reader:
            while (number := reader.read(1)[0]) != LAST:
                if number in SIGNALS and self.signal is None:
                    self._take(number)
                    received = time.monotonic()
                elif number in SIGNALS and time.monotonic() - received > SAME_SIGNAL:
                    self._end(f"{signal.Signals(number).name} came again", 128 + number)

    def _take(self, number: int) -> None:
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
    """A process that a rank has forked shares its pipe: signals that it gets are not the rank's."""
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
