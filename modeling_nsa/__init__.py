# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Native Sparse Attention models for transformers. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_nsa import NSADynamicLayer, NSAStaticLayer
from .configuration_nsa import NSAConfig
from .modeling_nsa import (
    NSACausalLMOutputWithPast,
    NSAForCausalLM,
    NSAForQuestionAnswering,
    NSAForSequenceClassification,
    NSAForTokenClassification,
    NSAModel,
    NSAModelOutputWithPast,
    NSAPreTrainedModel,
)
from .parallel_nsa import ContextShard, shard_inputs

__all__ = [
    "ContextShard",
    "NSACausalLMOutputWithPast",
    "NSAConfig",
    "NSADynamicLayer",
    "NSAForCausalLM",
    "NSAForQuestionAnswering",
    "NSAForSequenceClassification",
    "NSAForTokenClassification",
    "NSAModel",
    "NSAModelOutputWithPast",
    "NSAPreTrainedModel",
    "NSAStaticLayer",
    "shard_inputs",
]

AutoConfig.register(NSAConfig.model_type, NSAConfig, exist_ok=True)
AutoModel.register(NSAConfig, NSAModel, exist_ok=True)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NSAConfig, NSAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(NSAConfig, NSAForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(NSAConfig, NSAForQuestionAnswering, exist_ok=True)
