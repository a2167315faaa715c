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
    """Gives a function of the last seconds: means of clock_mhz and watts, and the share of them at the power's limit.

    It knows nothing where there is no GPU, or no nvidia-smi that answers.
    """
    with contextlib.ExitStack() as stack:
        readings = stack.enter_context(tempfile.NamedTemporaryFile("w+"))
        if device.type == "cuda":
            gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            command = ["nvidia-smi", "-i", gpu, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", "-lms"]
            with contextlib.suppress(FileNotFoundError):
                process = subprocess.Popen([*command, str(int(SECONDS * 1e3))], stdout=readings)
                stack.callback(process.wait)
                stack.callback(process.terminate)

        def means(seconds: float) -> dict[str, float]:
            with open(readings.name) as lines:
                found = [line.strip().split(", ") for line in lines]
            found = [reading for reading in found if len(reading) == 3][-max(1, int(seconds / SECONDS)) :]
            if not found:
                return {}
            clocks, watts, reasons = zip(*found)
            return {
                "clock_mhz": sum(map(float, clocks)) / len(found),
                "watts": sum(map(float, watts)) / len(found),
                "power_capped": sum(bool(int(reason, 16) & POWER_CAP) for reason in reasons) / len(found),
            }

        yield means
