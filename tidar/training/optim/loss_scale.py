"""Dynamic loss scaling for float16: small gradients must not underflow, and overflows are detected."""

import torch

from tidar.config.options import LossScale


class LossScaler:
    """DeepSpeed's dynamic loss scale (deepspeed/runtime/fp16/loss_scaler.py).

    An overflow decrements the hysteresis; once that is down to 1 it halves the scale. After a window of steps without
    overflow the scale doubles and the hysteresis is restored. (DeepSpeed's latest versions double one step later.)
    """

    def __init__(self, options: LossScale):
        self.options = options
        # scale, steps since the last overflow or doubling, remaining hysteresis; saved in checkpoints
        self.state = torch.tensor([options.start, 0, options.hysteresis], dtype=torch.float64)

    @property
    def scale(self) -> float:
        return float(self.state[0])

    def update(self, overflow: bool) -> None:
        """Updates the scale after a step. overflow: whether any rank's loss or gradients were not finite."""
        options = self.options
        scale, steps, hysteresis = self.state.tolist()
        if not options.dynamic:
            return
        if overflow:
            steps = 0
            if hysteresis <= 1:
                scale = max(scale / 2, options.minimum)
            else:
                hysteresis -= 1
        else:
            steps += 1
            if steps == options.window:
                scale, steps, hysteresis = scale * 2, 0, options.hysteresis
        self.state.copy_(torch.tensor([scale, steps, hysteresis], dtype=torch.float64))
