"""Training without FSDP2, whose copies and casts nothing needs where no other device has the same part of the model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from tidar.models import Decoder

# each copy begins at a multiple of this many elements, 128 bytes, as kernels require
APART = 64


class OneDevice:
    """A model with float32 master weights that computes with copies of them in the compute dtype.

    `copies`: by parameter, the tensor that replaces it while the model computes, and that gets its gradient; empty
    where the compute dtype is float32. They are filled once, before the first forward pass; after that the optimizer
    writes them along with the parameters, and nothing else may. All are views of one tensor, in the model's order,
    so that autograd detects a write to any of them between a forward and its backward pass.
    """

    def __init__(self, model: Decoder, param_dtype: torch.dtype, accumulates: bool):
        """accumulates: whether a step has several micro-batches, whose gradients are then accumulated in float32."""
        self.model = model
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self.are_current = False
        self.owners: list[tuple[nn.Module, str, nn.Parameter]] = []
        if param_dtype == torch.float32:
            return
        parameters = list(model.parameters())
        ends = list(accumulate(-(-parameter.numel() // APART) * APART for parameter in parameters))
        memory = torch.empty(ends[-1], dtype=param_dtype, device=parameters[0].device)
        for start, parameter in zip([0, *ends], parameters):
            copy = nn.Parameter(memory[start : start + parameter.numel()].view_as(parameter))
            self.copies[parameter] = copy
            if accumulates:
                copy.register_post_accumulate_grad_hook(_AddTo(parameter))
        for module in model.modules():
            self.owners += [(module, *named) for named in module.named_parameters(recurse=False)]

    def training(self, is_last: bool) -> AbstractContextManager[None]:
        """Context of the forward and backward pass of one micro-batch. is_last: of its step; has no effect here."""
        return self.validating()

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Context of forward passes without backward."""
        if self.copies and not self.are_current:
            # from the first weights, or those of a checkpoint
            with torch.no_grad():
                torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            self.are_current = True
        try:
            for module, name, parameter in self.owners:
                module._parameters[name] = self.copies[parameter]
            yield
        finally:
            for module, name, parameter in self.owners:
                module._parameters[name] = parameter

    def whole_parameters(self) -> dict[str, Tensor]:
        """The parameters by name in the compute dtype, whole on each rank: those that the model computes with, and not
        copies of them, where this rank has the whole model. All ranks call it.
        """
        with self.validating():
            return {name: self.model.shard.whole(name, p.detach()) for name, p in self.model.named_parameters()}


class _AddTo:
    """Adds the gradient of a copy to its parameter's, and frees it."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    def __call__(self, copy: Tensor) -> None:
        gradient: Any = copy.grad
        if self.parameter.grad is None:
            self.parameter.grad = gradient.float()
        else:
            self.parameter.grad += gradient
        copy.grad = None
