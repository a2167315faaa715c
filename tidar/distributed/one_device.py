"""Training on one device, where nothing is sharded: FSDP2's copies and casts would be work for nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

# elements: a copy begins at a multiple of them. 128 bytes, which divide any matrix of the sizes that kernels want
APART = 64


class OneDevice:
    """A model whose parameters the optimizer holds in float32, and which computes with copies in another type.

    `copies`: by parameter, what stands in its place while the model computes, and gets its gradient; empty where the
    arithmetic is float32. They are filled once, before the first forward pass; from then on the optimizer writes them
    together with the parameters, and nothing else may. All lie in one piece of memory, in the model's order: so they
    count as one tensor to autograd, which forbids to write any of them between a forward and its backward pass.
    """

    def __init__(self, model: nn.Module, param_dtype: torch.dtype, accumulates: bool):
        """accumulates: whether a step has several micro-batches, whose gradients are then added up in float32."""
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self.are_current = False
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
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
            self.places += [(module, *named) for named in module.named_parameters(recurse=False)]

    def training(self, is_last: bool) -> AbstractContextManager[None]:
        """For the forward and backward pass of one micro-batch. is_last: of its step; all are alike here."""
        return self.validating()

    @contextmanager
    def validating(self) -> Iterator[None]:
        """For forward passes alone."""
        if self.copies and not self.are_current:
            # the first weights, or those of a checkpoint
            with torch.no_grad():
                torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            self.are_current = True
        try:
            for module, name, parameter in self.places:
                module._parameters[name] = self.copies[parameter]
            yield
        finally:
            for module, name, parameter in self.places:
                module._parameters[name] = parameter


class _AddTo:
    """Adds the gradient of a copy to that of its parameter, and frees it."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    def __call__(self, copy: Tensor) -> None:
        if self.parameter.grad is None:
            self.parameter.grad = copy.grad.float()
        else:
            self.parameter.grad += copy.grad
        copy.grad = None
