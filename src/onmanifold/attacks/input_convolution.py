"""A first convolution whose gradient to the image is itself a convolution: on a CPU that takes half the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class InputConvolution(nn.Module):
    """A frozen convolution of few input channels and a stride.

    The library computes the gradient to such an input one value at a time. Here the input's pixels are sorted by
    their place in the stride's grid; each such phase is an ordinary convolution of the output's gradient with the
    part of the kernel that meets it (a sub-pixel convolution), so that all are one convolution of large width.

    Args:
        layer: What it stands for; `suits` says which can be.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.padding = layer.stride[0], int(layer.padding[0])
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("phases", _phases(layer.weight.detach(), self.stride, self.padding))

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is such a convolution."""
        return (
            type(layer) is nn.Conv2d
            and layer.in_channels <= 4
            and layer.stride[0] == layer.stride[1] > 1
            and not isinstance(layer.padding, str)
            and layer.padding[0] == layer.padding[1]
            and layer.kernel_size[0] == layer.kernel_size[1]
            and layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
        )

    def refresh(self) -> None:
        """Take in weights that were changed."""
        self.phases = _phases(self.weight.detach(), self.stride, self.padding)

    def forward(self, images: Tensor) -> Tensor:
        """As the layer's."""
        if images.is_cuda or not images.requires_grad:
            return functional.conv2d(
                images, self.weight, self.bias, stride=self.stride, padding=self.padding
            )
        result: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]
            images, self.weight, self.bias, self.phases, self.stride, self.padding
        )
        return result


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        phases: Tensor,
        stride: int,
        padding: int,
    ) -> Tensor:
        ctx.save_for_backward(phases)
        ctx.shape, ctx.stride = images.shape, stride
        ctx.first = _reach(weight.shape[2], stride, padding)[0]
        return functional.conv2d(images, weight, bias, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (phases,), (gradient,) = ctx.saved_tensors, gradients
        pads: list[int] = []
        for size, side in ((phases.shape[3], 3), (phases.shape[2], 2)):
            places = -(-ctx.shape[side] // ctx.stride)
            pads += [-ctx.first, places + size - 1 + ctx.first - gradient.shape[side]]
        if pads[0] == pads[1] == pads[2] == pads[3] >= 0:
            found = functional.conv2d(gradient, phases, padding=pads[0])
        else:
            found = functional.conv2d(functional.pad(gradient, pads), phases)
        images = functional.pixel_shuffle(found, ctx.stride)
        images = images[..., : ctx.shape[2], : ctx.shape[3]]
        return images, None, None, None, None, None


def _reach(size: int, stride: int, padding: int) -> tuple[int, int]:
    """How many outputs before and after its own place in the grid a pixel takes part in; the first is negative."""
    return -((size - 1 - padding) // stride), (stride - 1 + padding) // stride


def _phases(weight: Tensor, stride: int, padding: int) -> Tensor:
    """The kernel (C · stride², outputs, R, R) that turns the output's gradient into that of each phase."""
    outputs, channels, size, _ = weight.shape
    first, last = _reach(size, stride, padding)
    span = last - first + 1
    kernel = weight.new_zeros(channels, stride, stride, outputs, span, span)
    # Phase a of place i meets output i + d by the kernel's coordinate a + padding − stride · d.
    meets = [
        (phase, shift, coordinate)
        for phase in range(stride)
        for shift in range(span)
        if 0 <= (coordinate := phase + padding - stride * (shift + first)) < size
    ]
    for row, down, y in meets:
        for column, right, x in meets:
            kernel[:, row, column, :, down, right] = weight[:, :, y, x].T
    return kernel.flatten(0, 2).contiguous(memory_format=torch.channels_last)
