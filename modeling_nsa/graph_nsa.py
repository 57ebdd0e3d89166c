# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding steps of `generate` as one CUDA graph, so that the GPU hardly waits for Python between them.

Before every launch, code that transformers has compiled checks each parameter, each tensor of the cache and its own
guards. All of these stay the same during one call of `generate`, but for what `DecodeGraph` compares.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.generation import CompileConfig
from transformers.utils import logging

from .cache_nsa import CACHE_NAME, CACHE_NAMES, NSAStaticLayer

__all__ = ["DecodeGraph", "captures"]

logger = logging.get_logger(__name__)

# compiling, and then what runs only once: both would break a capture
_STEPS_BEFORE_CAPTURE = 2
# these keep all that changes in tensors, which they write in place; a sliding layer counts in Python
_LAYERS = (NSAStaticLayer, StaticLayer)
# torch allows one capture at a time in a process
_LOCK = threading.Lock()


def captures(model: nn.Module) -> bool:
    """Whether steps of the model may be captured as it is now.

    It has to be on one GPU, in eval mode, without gradients, and made of plain parameters (not quantised, sharded or
    offloaded). A replay would not run hooks.
    """
    if model.device.type != "cuda" or model.training or torch.is_grad_enabled():
        return False
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    if not all(type(x) is nn.Parameter and x.device == model.device for x in model.parameters()):
        return False
    return all(x.device == model.device for x in model.buffers()) and not any(map(_is_hooked, model.modules()))


def _is_hooked(module):
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    # transformers leaves its own behind once hidden states or attentions were asked for; they do nothing after that
    own = "transformers.utils.output_capturing"
    return hasattr(module, "_hf_hook") or any(getattr(hook, "__module__", None) != own for hook in hooks)


class DecodeGraph:
    """`model(**inputs)` for the steps of one call of `generate`: compiled twice, then captured once and replayed.

    Before a replay, shapes and values of the inputs and the addresses of the cache's tensors are compared: where they
    differ from the step before (beam search puts new tensors into the cache), it starts anew. Weights may change in
    place, but nothing of the model may be replaced or set otherwise while this object is used.

    Args:
        model: The model; `captures(model)` holds.
        otherwise: Returns what is called in place of the model where a step cannot be captured: inputs other than one
            token a row and a static cache of full and sparse layers, or outputs other than logits.
    """

    def __init__(self, model: nn.Module, otherwise: Callable[[], Callable]):
        self._model, self._otherwise = model, otherwise
        self._possible = True
        self._signature = self._graph = None

    def __call__(self, **inputs):
        if not (self._possible and _is_step(inputs)):
            return self._otherwise()(**inputs)
        signature = _signature(inputs)
        if signature != self._signature:
            self._signature, self._steps = signature, 0
            self._graph = self._output = None
            self._inputs = _copy(inputs)
        torch._foreach_copy_(_tensors(self._inputs), _tensors(inputs))
        self._steps += 1
        if self._steps <= _STEPS_BEFORE_CAPTURE:
            output = _run_aside(self._run, self._model.device)
            self._possible = set(output) <= {"logits", CACHE_NAME}
            return output
        if self._graph is None:
            try:
                self._graph, self._output = _capture(self._run, self._model.device)
            except RuntimeError as error:  # nothing has been computed: the cache is as it was
                self._possible = False
                logger.warning_once(f"A decoding step is not captured in a CUDA graph, which makes it slower: {error}")
                return self._otherwise()(**inputs)
        self._graph.replay()
        # the next replay overwrites them
        return type(self._output)(**{**self._output, "logits": self._output.logits.clone()})

    def _run(self):
        return _compiled()(self._model, self._inputs)


def _cache(inputs):
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def _is_step(inputs):
    cache, ids = _cache(inputs), inputs.get("input_ids")
    if type(cache) is not StaticCache or cache.offloading or not isinstance(ids, torch.Tensor) or ids.shape[1] != 1:
        return False
    if not all(type(layer) in _LAYERS and layer.is_initialized for layer in cache.layers):
        return False
    return all(
        value.device == ids.device if isinstance(value, torch.Tensor) else value is cache or _is_plain(value)
        for _, value in _leaves(inputs)
    )


def _is_plain(value):
    return value is None or isinstance(value, (bool, int, float, str))


def _leaves(inputs):
    """Names and values, in order, also of what nested dicts hold (masks by layer type)."""
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield name, len(value)
            yield from _leaves(value)
        else:
            yield name, value


def _tensors(inputs):
    return [value for _, value in _leaves(inputs) if isinstance(value, torch.Tensor)]


def _copy(inputs):
    """The inputs with tensors of their own, of the strides that contiguous tensors have."""
    copies = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            value = _copy(value)
        elif isinstance(value, torch.Tensor):
            value = value.clone(memory_format=torch.contiguous_format)
        copies[name] = value
    return copies


def _signature(inputs):
    """What a graph takes for granted."""
    leaves = [
        (name, value.shape, value.dtype) if isinstance(value, torch.Tensor) else (name, value)
        for name, value in _leaves(inputs)
    ]
    layers = _cache(inputs).layers
    held = [x.data_ptr() for layer in layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    return leaves, held


def _forward(model, inputs):
    return model(**inputs)


@functools.cache
def _compiled():
    # as transformers compiles by itself, but without inductor's CUDA graphs inside the one that is captured here
    return torch.compile(_forward, **{**CompileConfig().to_dict(), "mode": "default"})


@functools.cache
def _side_stream(device):
    # one for all, because cuBLAS keeps a workspace for every stream that it has seen
    return torch.cuda.Stream(device)


def _run_aside(function, device):
    """Run a step on the stream of the capture, where it allocates what a capture cannot."""
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    with _LOCK:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            output = function()
        current.wait_stream(side)
    for x in tree_leaves(output):
        if isinstance(x, torch.Tensor):
            x.record_stream(current)
    return output


def _capture(function, device):
    """A CUDA graph of a step, and what the step returns, whose tensors the graph fills.

    Raises:
        RuntimeError: The step does what a capture forbids. Nothing of it has been computed.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device)
    try:
        # should the capture fail, torch.cuda.graph stays on its stream: the context around it goes back
        with _LOCK, torch.cuda.stream(side), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            return graph, function()
    except RuntimeError:
        # a failed capture leaves the generator's state in use, and sampling would raise: a copy is not
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
