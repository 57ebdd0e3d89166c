# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""One matrix product for several linear layers of the same input, whose weights lie in one tensor.

Nothing but the parameters themselves is kept: whether they still lie side by side is seen when the product runs,
outside compiled code. So a parameter that was replaced is used as it is, only not in one product.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["fuse_linears", "fused_linear"]

# named after the package, so that a copy of it under another name registers beside it
_NAMESPACE = re.sub(r"\W", "_", __package__)
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def fuse_linears(linears: dict[str, nn.Module]) -> bool:
    """Move the weights of the layers into one tensor, and the biases if all have one.

    Parameters stay the objects that they are, and become slices of it.

    Returns:
        Whether that can be done: they are plain `nn.Linear` (no adapters, hooks or DTensor) with weights of their own,
        of one dtype, on one device. Else nothing is changed.
    """
    if not all(map(_is_plain, linears.values())):
        return False
    weights, biases = _parameters(linears)
    kinds = {(x.dtype, x.device, x.shape[1]) for x in weights}
    if len(kinds) > 1 or weights[0].is_meta or len(set(weights)) < len(weights):
        return False
    with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
        for parameters in filter(None, (weights, biases)):
            if _joined(parameters) is None:
                parts = torch.cat([x.data for x in parameters]).split([x.shape[0] for x in parameters])
                for parameter, part in zip(parameters, parts):
                    parameter.data = part
    return True


def fused_linear(x: torch.Tensor, linears: dict[str, nn.Module]) -> dict[str, torch.Tensor] | None:
    """What each layer makes of `x`, by name: slices of the last dim of one product; without gradients or autocast.

    Where only some layers have a bias, it is added to their slices. None if the layers are not plain `nn.Linear`.
    """
    if not all(map(_is_plain, linears.values())):
        return None
    weights, biases = _parameters(linears)
    parts = _fused_linear(x, weights, biases).split([weight.shape[0] for weight in weights], dim=-1)
    outputs = dict(zip(linears, parts))
    if not biases:
        for name, linear in linears.items():
            if linear.bias is not None:
                outputs[name] = outputs[name] + linear.bias
    return outputs


def _is_plain(linear):
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )


def _parameters(linears):
    """Weights, and biases if all layers have one."""
    weights = [linear.weight for linear in linears.values()]
    biases = [linear.bias for linear in linears.values()]
    return weights, [] if any(bias is None for bias in biases) else biases


def _joined(tensors):
    """One tensor over the memory of all, or None where they do not follow each other in one."""
    first, rows = tensors[0], 0
    start, row = first.storage_offset(), first[0].numel()
    for x in tensors:
        # separate allocations can be neighbours too: then the offsets differ
        follows = x.storage_offset() == start + rows * row
        follows &= x.data_ptr() == first.data_ptr() + rows * row * first.element_size()
        if not (follows and x.dtype == first.dtype and x.is_contiguous()):
            return None
        rows += x.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _compute(x, weights, biases):
    joined = [_joined(parameters) for parameters in (weights, biases) if parameters]
    if all(parameter is not None for parameter in joined):
        return F.linear(x, *joined)
    return torch.cat([F.linear(x, *parameters) for parameters in zip(*filter(None, (weights, biases)))], dim=-1)


def _fake(x, weights, biases):
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


_LIBRARY.define(
    "fused_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_LIBRARY.impl("fused_linear", _compute, "CompositeExplicitAutograd")
torch.library.register_fake(f"{_NAMESPACE}::fused_linear", _fake, lib=_LIBRARY)
_fused_linear = getattr(torch.ops, _NAMESPACE).fused_linear.default
