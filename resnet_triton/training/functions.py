"""``torch.autograd.Function`` of a block and of the stem in training mode.

What is saved is the input, the output, and the raw outputs between them: no normalised tensor, no mask, and in the
Gram form nothing of the last convolution. The backward is not differentiable: asking for second derivatives raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops as _ops  # noqa: F401  (defines the operators)

ops = torch.ops.resnet_triton


def refuse_second_derivatives() -> None:
    """Raises NotImplementedError inside a backward that is itself recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "gradients of fused training blocks cannot be differentiated again (create_graph=True); "
            "run the model that needs second derivatives as resnet_triton.unconvert(model), or its BN in eval mode"
        )


class TrainBlock(Function):
    """``(x, shortcut, eps, geometry, project, flags, group, *tensors) -> (y, stats...)``.

    Arguments as ``torch.ops.resnet_triton.train_block``. ``stats`` are those of each unit, the projection's last; they
    are not differentiable.
    """

    @staticmethod
    def forward(x, shortcut, eps, geometry, project, flags, group, *tensors):
        return tuple(
            ops.train_block(x, shortcut, list(tensors), list(eps), list(geometry), project, list(flags), group)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, shortcut, ctx.eps, ctx.geometry, ctx.project, ctx.flags, ctx.group, *tensors = inputs
        ctx.save_for_backward(x, shortcut, *tensors, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivatives()
        n = len(ctx.eps)
        x, shortcut, *rest = ctx.saved_tensors
        tensors, saved = rest[: 5 * n], rest[5 * n :]
        if grad is None:
            return (None,) * (7 + 5 * n)
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        for i in range(n):
            needs += ctx.needs_input_grad[7 + 5 * i : 10 + 5 * i]
        dx, dshortcut, *found = ops.train_block_backward(
            grad, x, shortcut, tensors, saved, list(ctx.eps), list(ctx.geometry), ctx.project, list(ctx.flags),
            ctx.group, needs,
        )  # fmt: skip
        grads: list[Tensor | None] = []
        for i in range(n):
            three = [g if need else None for g, need in zip(found[3 * i : 3 * i + 3], needs[2 + 3 * i :], strict=False)]
            grads += [*three, None, None]
        return (dx if needs[0] else None, dshortcut if needs[1] else None, None, None, None, None, None, *grads)


class TrainStem(Function):
    """``(x, weight, gamma, beta, mean, var, eps, group) -> (y, raw, stats)``; only y is differentiable."""

    @staticmethod
    def forward(x, weight, gamma, beta, mean, var, eps, group):
        return tuple(ops.train_stem(x, weight, gamma, beta, mean, var, eps, group))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, ctx.group = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivatives()
        if grad is None:
            return (None,) * 8
        x, weight, gamma, beta, mean, var, *saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        found = ops.train_stem_backward(grad, x, weight, gamma, beta, mean, var, saved, ctx.eps, ctx.group, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None, None)


def differentiating(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
