"""The scale of the loss in float16, so that small gradients do not vanish and large ones are noticed."""

import torch

from tidar.config.options import LossScale


class LossScaler:
    """DeepSpeed's dynamic scale (deepspeed/runtime/fp16/loss_scaler.py).

    An overflow uses up hysteresis, and once there is one left it halves the scale. After a window of steps without
    overflow the scale doubles, and only then is the hysteresis restored. (Its latest versions double a step later.)
    """

    def __init__(self, options: LossScale):
        self.options = options
        # scale, steps since the last overflow or doubling, hysteresis left: saved with checkpoints
        self.state = torch.tensor([options.start, 0, options.hysteresis], dtype=torch.float64)

    @property
    def scale(self) -> float:
        return float(self.state[0])

    def update(self, overflow: bool) -> None:
        """Takes in whether a step has overflowed, on any rank."""
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
