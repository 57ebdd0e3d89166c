# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Registration of the Triton operations with `torch.library`: each is one node of a compiled graph, with gradients."""

import functools
import re

import torch

from .triton_common import Layout, like

__all__ = ["WHERE", "define", "define_attention"]

# named after the package, so that a copy of it under another name registers beside it
_NAMESPACE = re.sub(r"\W", "_", __package__)
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
# The arguments of `Layout`.
WHERE = "Tensor? leftpad, SymInt q_offset, Tensor? cu_seqlens"


def _on_the_device_of_its_tensors(implementation):
    """Triton starts kernels on the current device, which a model spread over several GPUs does not change."""

    @functools.wraps(implementation)
    def run(*args):
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return implementation(*args)
        with torch.cuda.device(device):
            return implementation(*args)

    return run


def define(schema, implementation, fake, *, gradient=None, any_strides=False):
    """Register an operation that works alike on every device.

    Args:
        schema: As `torch.library.Library.define` takes it.
        implementation: Computes it.
        fake: Allocates what it returns, without reading data.
        gradient: `setup_context` and `backward`, as `torch.library.register_autograd` takes them.
        any_strides: Whether compiled code may change strides of inputs. Where it may not, it copies what it has not yet
            computed for every call: what all layers share, in each of them.

    Returns:
        The operation, to be called like `implementation`, with positional arguments.
    """
    name = schema.partition("(")[0]
    strides = (torch.Tag.flexible_layout,) if any_strides else ()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *strides))
    _LIBRARY.impl(name, _on_the_device_of_its_tensors(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if gradient is not None:
        setup_context, backward = gradient
        torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def define_attention(name, tensors, sizes, outputs, compute, compute_backward, fake, *, learned, graded, kept):
    """Register an attention operation and its gradient.

    Args:
        name: Its name; the gradient is called `{name}_backward`.
        tensors: Names of the tensors it takes, in one string; the first is q.
        sizes: Its other arguments, as schemas write them; leftpad, q_offset and cu_seqlens follow.
        outputs: Names of the tensors it returns.
        compute: Called with tensors, sizes and a `Layout` made of the rest; returns the outputs.
        compute_backward: Called with the gradients of the first `graded` outputs, each a tensor or None, the tensors,
            the outputs that are `kept`, sizes and a `Layout`; returns contiguous gradients of the first `learned`
            tensors.
        fake: Called with the arguments; allocates the outputs.
        learned, graded: See above.
        kept: Slice of the outputs that the gradient needs.

    Returns:
        The operation, to be called with tensors, sizes, leftpad, q_offset and cu_seqlens.
    """
    names, results, constants = tensors.split(), outputs.split(), sizes.count(",") + 1

    def schema(name, arguments, returned):
        return f"{name}({', '.join(arguments)}, {sizes}, {WHERE}) -> ({', '.join(['Tensor'] * returned)})"

    given = [f"Tensor {x}" for x in names]
    saved = (*(f"Tensor? d{x}" for x in results[:graded]), *given, *(f"Tensor {x}" for x in results[kept]))
    gradient = define(
        schema(f"{name}_backward", saved, learned),
        lambda *args: compute_backward(*args[:-3], Layout(args[graded], *args[-3:])),
        lambda *args: like(*args[graded : graded + learned]),
    )

    def setup_context(ctx, inputs, output):
        *given, leftpad, ctx.q_offset, cu_seqlens = inputs
        ctx.sizes = given[len(names) :]
        ctx.save_for_backward(*given[: len(names)], *output[kept], leftpad, cu_seqlens)
        ctx.mark_non_differentiable(*output[graded:])
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        *saved, leftpad, cu_seqlens = ctx.saved_tensors
        grads = gradient(*grads[:graded], *saved, *ctx.sizes, leftpad, ctx.q_offset, cu_seqlens)
        return *grads, *(None for _ in range(len(names) - learned + constants + 3))

    return define(
        schema(name, given, len(results)),
        lambda *args: compute(*args[:-3], Layout(args[0], *args[-3:])),
        fake,
        gradient=(setup_context, backward),
    )
