"""Clock and power of a GPU while it works: large kernels run at the limit of its power, below that of its clock."""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import torch

SECONDS = 0.2  # between two readings
FIELDS = "clocks.sm,power.draw,clocks_event_reasons.active"
POWER_CAP = 4  # of the reasons, why the clock is no higher


@contextlib.contextmanager
def power_log(device: torch.device) -> Iterator[Callable[[float], dict[str, float]]]:
    """Yields a function of seconds: means of clock_mhz and watts over the last ones, and the share at the power limit.

    It returns nothing without a GPU, or where nvidia-smi does not answer.
    """
    with contextlib.ExitStack() as stack:
        readings = stack.enter_context(tempfile.NamedTemporaryFile("w+"))
        if device.type == "cuda":
            gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            command = ["nvidia-smi", "-i", gpu, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", "-lms"]
            with contextlib.suppress(OSError):
                process = subprocess.Popen([*command, str(int(SECONDS * 1e3))], stdout=readings)
                stack.callback(process.wait)
                stack.callback(process.terminate)

        def means(seconds: float) -> dict[str, float]:
            found = []
            with open(readings.name) as lines:
                for line in lines:
                    # a card may not report all of it, and the last line may be incomplete
                    with contextlib.suppress(ValueError):
                        clock, watts, reasons = line.strip().split(", ")
                        found.append((float(clock), float(watts), bool(int(reasons, 16) & POWER_CAP)))
            found = found[-max(1, int(seconds / SECONDS)) :]
            names = ("clock_mhz", "watts", "power_capped")
            return {name: sum(values) / len(found) for name, values in zip(names, zip(*found))}

        yield means
