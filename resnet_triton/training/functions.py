"""``torch.autograd.Function`` of a block and of the stem in training mode.

What is saved is the input, the output, and the raw outputs between them: no normalised tensor, no mask, and in the
Gram form nothing of the last convolution. The backward is not differentiable: asking for second derivatives raises.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops as _ops  # noqa: F401  (defines the operators)
from .block import Form, given

ops = torch.ops.resnet_triton


def refuse_second_derivatives() -> None:
    """Raises NotImplementedError inside a backward that is itself recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "gradients of fused training blocks cannot be differentiated again (create_graph=True); "
            "run the model that needs second derivatives as resnet_triton.unconvert(model), or its BN in eval mode"
        )


class TrainBlock(Function):
    """``(x, shortcut, eps, geometry, project, flags, group, ahead_raw, ahead_stats, *tensors) -> (y, ...)``.

    Arguments and results as of ``torch.ops.resnet_triton.train_block``. Only y is differentiable. What was computed
    ahead is a value here, and what follows too: the gradients of that convolution are the next block's.
    """

    @staticmethod
    def forward(x, shortcut, eps, geometry, project, flags, group, ahead_raw, ahead_stats, *tensors):
        ahead = [] if ahead_raw is None else [ahead_raw, ahead_stats]
        return tuple(
            ops.train_block(x, shortcut, list(tensors), list(eps), list(geometry), project, list(flags), group, ahead)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, shortcut, eps, geometry, ctx.project, ctx.flags, ctx.group, raw, stats, *tensors = inputs
        following = ctx.flags[-1]
        ctx.following = following
        n = len(eps) - following
        ctx.eps, ctx.geometry = eps[:n], geometry[: 3 * n]
        main = n - ctx.project
        form = Form(gram=ctx.flags[2], following=following)
        saved = given(output, [] if raw is None else [raw, stats], main, form)
        ctx.save_for_backward(x, shortcut, *tensors[: 5 * n], *saved)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivatives()
        n = len(ctx.eps)
        x, shortcut, *rest = ctx.saved_tensors
        tensors, saved = rest[: 5 * n], rest[5 * n :]
        if grad is None:
            return (None,) * (9 + 5 * (n + ctx.following))
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        for i in range(n):
            needs += ctx.needs_input_grad[9 + 5 * i : 12 + 5 * i]
        dx, dshortcut, *found = ops.train_block_backward(
            grad, x, shortcut, tensors, saved, list(ctx.eps), list(ctx.geometry), ctx.project, list(ctx.flags),
            ctx.group, needs,
        )  # fmt: skip
        grads: list[Tensor | None] = []
        for i in range(n):
            three = [g if need else None for g, need in zip(found[3 * i : 3 * i + 3], needs[2 + 3 * i :], strict=False)]
            grads += [*three, None, None]
        grads += [None] * (5 * ctx.following)
        return (dx if needs[0] else None, dshortcut if needs[1] else None, *[None] * 7, *grads)


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
