# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Liger's kernels in NSA models: what `use_liger_kernel=True` of `Trainer` applies.

Liger keeps a table of functions by model type and does nothing for a type that is not in it. Importing liger_kernel
imports triton and takes seconds, so the entry is made when Liger's table comes into being, not before.
"""

import importlib.abc
import importlib.util
import sys
from types import MethodType

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import can_return_tuple

from .cache_nsa import CACHE_NAME, takes_cache_by_either_name

__all__ = ["apply_liger_kernel_to_nsa", "register_with_liger"]

_TABLE = "liger_kernel.transformers.monkey_patch"


class _OnImport(importlib.abc.MetaPathFinder):
    """Calls a function with Liger's module when that has been imported."""

    def __init__(self, then):
        self.then = then

    def find_spec(self, name, path=None, target=None):
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


def register_with_liger(model_type: str) -> None:
    """Enter `apply_liger_kernel_to_nsa` into Liger's table of model types, now or when Liger is imported."""

    def enter(module):
        module.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type] = apply_liger_kernel_to_nsa

    if _TABLE in sys.modules:
        enter(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _OnImport(enter))


def apply_liger_kernel_to_nsa(
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
) -> None:
    """Make a model use Liger's kernels; the arguments are the keys of `liger_kernel_config`.

    Args:
        fused_linear_cross_entropy: The loss in training goes from hidden states to the number, and no logits are made.
        rms_norm: All norms.
        swiglu: The MLPs, where their activation is SiLU.
        model: A causal language model or another head.

    Raises:
        ValueError: No model, or one under tensor parallelism: the fused loss needs the whole output layer.
    """
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    if model is None:
        raise ValueError("`model` must be a model that has been loaded, got None: pass `model=`.")
    if fused_linear_cross_entropy and (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "`fused_linear_cross_entropy` needs the whole output layer on every device, which tensor parallelism "
            f"shards over {model.tp_size}: set it to False in `liger_kernel_config`."
        )
    for module in model.modules():
        if rms_norm and isinstance(module, LlamaRMSNorm):
            _patch_rms_norm_module(module)
        if rms_norm and isinstance(module, Gemma3RMSNorm):
            _patch_rms_norm_module(module, offset=1.0, casting_mode="gemma", in_place=False)
        if swiglu and isinstance(module, LlamaMLP) and model.config.hidden_act in ("silu", "swish"):
            _patch_swiglu_module(module, LigerSwiGLUMLP)
    if fused_linear_cross_entropy and hasattr(model, "lm_head"):
        model.forward = MethodType(_fused_forward, model)


@takes_cache_by_either_name
@can_return_tuple
def _fused_forward(
    self,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.LongTensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    skip_logits: bool | None = None,
    **kwargs,
):
    """As `NSAForCausalLM.forward`; with labels in training, or with `skip_logits=True`, the loss without logits."""
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    from .modeling_nsa import NSACausalLMOutputWithPast

    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    skip_logits = self.training if skip_logits is None else skip_logits
    # an adapter on the output layer is more than the layer's weight
    if labels is None or not skip_logits or not isinstance(self.lm_head, nn.Linear):
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    outputs = self.model(**inputs, **kwargs)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    loss = LigerForCausalLMLoss(
        hidden_states=outputs.last_hidden_state[:, kept],
        lm_head_weight=self.lm_head.weight,
        labels=labels,
        hidden_size=self.config.hidden_size,
        final_logit_softcapping=self.config.final_logit_softcapping,
        **kwargs,
    )
    return NSACausalLMOutputWithPast(
        loss=loss,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        block_indices=outputs.block_indices,
        gates=outputs.gates,
        **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
    )
