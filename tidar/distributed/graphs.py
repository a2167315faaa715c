"""A decoder's layers as two CUDA graphs, one for each direction: without them the host takes as long as an H200."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tidar.models import copy_mask, mask_tensors


class GraphedLayers:
    """Runs a decoder's layers as always, and then, once they are compiled, from graphs of their kernels.

    The graphs have inputs, activations and gradients of their own in memory that they keep. What has another shape, a
    mask that is not made of ranges, or no gradients is run as always.
    """

    def __init__(self, run_layers: Callable[..., Tensor], parameters: Callable[[], list[nn.Parameter]], copies: bool):
        """run_layers: of `Decoder`; parameters: those of its layers, as it computes with them.
        copies: gives gradients out as copies. Without, they are gone with the next backward pass.
        """
        self.run_layers = run_layers
        self.parameters = parameters
        self.copies = copies
        self.is_compiled = False
        self.graphs: _Graphs | None = None

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask) -> Tensor:
        if not torch.is_grad_enabled() or mask_tensors(mask) is None:
            return self.run_layers(x, cos, sin, mask)
        if not self.is_compiled:
            self.is_compiled = True
            return self.run_layers(x, cos, sin, mask)
        if self.graphs is None:
            self.graphs = _Graphs(self.run_layers, self.parameters(), self.copies, x, cos, sin, mask)
        if self.graphs.x.shape != x.shape:
            return self.run_layers(x, cos, sin, mask)
        self.graphs.fill(cos, sin, mask)
        return _Replay.apply(self.graphs, x, *self.graphs.parameters)


class _Graphs:
    """Captures both directions without running them."""

    def __init__(
        self,
        run_layers: Callable,
        parameters: list[nn.Parameter],
        copies: bool,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: BlockMask,
    ):
        self.parameters = parameters
        self.copies = copies
        self.x = torch.empty_like(x).requires_grad_()
        self.cos, self.sin, self.mask = cos.clone(), sin.clone(), copy_mask(mask)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # other threads may go on to use CUDA: those that load data, and NCCL's
        options = {"pool": torch.cuda.graph_pool_handle(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **options):
            self.out = run_layers(self.x, self.cos, self.sin, self.mask)
        self.d_out = torch.empty_like(self.out)
        with torch.cuda.graph(self.backward, **options):
            self.gradients = torch.autograd.grad(self.out, (self.x, *parameters), self.d_out)
        self.out = self.out.detach()

    def fill(self, cos: Tensor, sin: Tensor, mask: BlockMask) -> None:
        torch._foreach_copy_([self.cos, self.sin, *mask_tensors(self.mask)], [cos, sin, *mask_tensors(mask)])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs: _Graphs, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.graphs = graphs
        graphs.x.detach().copy_(x)
        graphs.forward.replay()
        return graphs.out.detach()

    @staticmethod
    def backward(ctx, d_out: Tensor):
        graphs = ctx.graphs
        graphs.d_out.copy_(d_out)
        graphs.backward.replay()
        return None, *(gradient.clone() if graphs.copies else gradient.detach() for gradient in graphs.gradients)
