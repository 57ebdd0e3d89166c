# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The Native Sparse Attention decoder (arXiv 2502.11089) as transformers models."""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from nsa_kernels.availability import triton_error

from .attention_nsa import (
    NSAAttention,
    NSACompression,
    NSADenseAttention,
    NSAGateScale,
    init_nsa_parameters,
    make_norm,
    split_ropes,
)
from .cache_nsa import CACHE_NAME, CACHE_NAMES, prepare_cache, takes_cache_by_either_name
from .configuration_nsa import NSA_LAYER_TYPE, NSAConfig
from .graph_nsa import DecodeGraph, captures
from .layout_nsa import NSALayout, build_layout, packed_sequences
from .liger_nsa import register_with_liger
from .parallel_nsa import ContextShard, build_parallel_layout

__all__ = [
    "NSACausalLMOutputWithPast",
    "NSAForCausalLM",
    "NSAForQuestionAnswering",
    "NSAForSequenceClassification",
    "NSAForTokenClassification",
    "NSAModel",
    "NSAModelOutputWithPast",
    "NSAPreTrainedModel",
]

logger = logging.get_logger(__name__)

_MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass
class NSAModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Args:
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            One `[batch, heads, tokens, keys]` per layer. For a sparse layer: the token probabilities of its selection
            branch, 0 for tokens in blocks that are not chosen. Not available for packed sequences. Full and sliding
            layers give theirs with `attn_implementation="eager"`.
        block_indices (`tuple(torch.IntTensor)`, *optional*, returned with `output_block_indices=True`):
            One `[batch, tokens, key/value heads, n]` per sparse layer: the blocks that each query attends to,
            ascending, padded with -1. Block j holds the tokens j·l' … j·l' + l' - 1 of the row, counted from its first
            real token.
        gates (`tuple(torch.FloatTensor)`, *optional*, returned with `output_gates=True`):
            One `[batch, tokens, heads, 3]` per sparse layer: gates of the compression, selection and window branches,
            scales included.
    """

    block_indices: tuple[torch.IntTensor, ...] | None = None
    gates: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class NSACausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned with `labels`):
            Next-token cross-entropy.
        logits (`torch.FloatTensor` of shape `(batch, tokens, vocab_size)`):
            Scores of the next token.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            As in [`NSAModelOutputWithPast`].
        block_indices (`tuple(torch.IntTensor)`, *optional*, returned with `output_block_indices=True`):
            As in [`NSAModelOutputWithPast`].
        gates (`tuple(torch.FloatTensor)`, *optional*, returned with `output_gates=True`):
            As in [`NSAModelOutputWithPast`].
    """

    block_indices: tuple[torch.IntTensor, ...] | None = None
    gates: tuple[torch.FloatTensor, ...] | None = None


class NSARotaryEmbeddings(nn.Module):
    """cos and sin of several RoPEs side by side, in the order of `config.rope_thetas`."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.ropes = nn.ModuleList()
        for theta in config.rope_thetas:
            own = copy.copy(config)
            if theta is not None:
                own.rope_parameters = {"rope_type": "default", "rope_theta": theta}
            self.ropes.append(LlamaRotaryEmbedding(config=own))

    def forward(self, x, position_ids):
        return tuple(torch.cat(parts, dim=-1) for parts in zip(*(rope(x, position_ids) for rope in self.ropes)))


class NSADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NSAConfig, layer_idx: int):
        super().__init__()
        sparse = config.layer_types[layer_idx] == NSA_LAYER_TYPE
        self.self_attn = (NSAAttention if sparse else NSADenseAttention)(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.norms_outputs = config.decoder_type == "gemma3"
        if self.norms_outputs:
            self.pre_feedforward_layernorm = make_norm(config, config.hidden_size)
            self.post_feedforward_layernorm = make_norm(config, config.hidden_size)

    @takes_cache_by_either_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        layout: NSALayout | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, *_ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            layout=layout,
            **kwargs,
        )
        if self.norms_outputs:  # here this norm follows the attention, in Llama it precedes the MLP
            hidden_states = residual + self.post_attention_layernorm(hidden_states)
            output = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            return hidden_states + self.post_feedforward_layernorm(output)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


_FORWARD_INTRO = """
    With `output_block_indices=True` the output has `block_indices`, for every sparse layer the blocks that each query
    read, int32 `[batch, tokens, key/value heads, n]`, padded with -1; with `output_gates=True`, `gates`,
    `[batch, tokens, heads, 3]` (compressed, selected, window). `context_shard` is what `shard_inputs` returns.
    """


@auto_docstring
class NSAPreTrainedModel(PreTrainedModel):
    config: NSAConfig
    config_class = NSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NSADecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_record_outputs = {
        "hidden_states": NSADecoderLayer,
        "attentions": NSADenseAttention,
        "block_indices": OutputRecorder(NSAAttention, index=2),
        "gates": OutputRecorder(NSAAttention, index=3),
    }

    def __init__(self, config: NSAConfig, *args, **kwargs):
        # the heads make their backbone through AutoModel, which need not know this copy of the code
        AutoModel.register(type(config), NSAModel, exist_ok=True)
        super().__init__(config, *args, **kwargs)
        self.add_model_tags("native-sparse-attention")

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # leaf modules only: containers are not visited when their children are done
        if isinstance(module, (NSACompression, NSAGateScale)) or getattr(module, "starts_at_zero", False):
            init_nsa_parameters(module, self.config.initializer_range)
        elif isinstance(module, Gemma3RMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, Gemma3TextScaledWordEmbedding):
            init.constant_(module.embed_scale, module.scalar_embed_scale)

    def fuse_projections(self):
        """Let one matrix product make all that an attention layer projects from its input, for faster decoding.

        The weights of a layer's projections, and of its gates' first layer, move into one tensor, of which every
        parameter is a slice from then on: names, memory, `state_dict`, `save_pretrained` and training stay as they
        are. The product is used without gradients or autocast, for at most 16 tokens a row. Layers with adapters,
        quantised or sharded projections compute as before, also when they become so later. Parameters that are
        replaced (`load_state_dict(assign=True)`) are used, one by one until this is called again. Save with
        `save_pretrained`: accelerate's `save_model` leaves out tensors that share memory.

        Returns:
            The model.

        Raises:
            ValueError: No layer can be fused.
        """
        layers = [module for module in self.modules() if isinstance(module, NSADenseAttention)]
        if sum(layer.fuse() for layer in layers) == 0:
            q_proj = layers[0].q_proj
            raise ValueError(
                "`fuse_projections` needs a layer whose projections are plain nn.Linear, without hooks, with weights "
                f"of one dtype on one device, got e.g. {type(q_proj).__name__} on {q_proj.weight.device}. Load the "
                "weights and merge adapters first; quantised, sharded and offloaded models run without it."
            )
        return self


@auto_docstring(custom_intro="The bare native sparse attention decoder, without a head.")
class NSAModel(NSAPreTrainedModel):
    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        embedding, scale = nn.Embedding, {}
        if config.decoder_type == "gemma3":
            embedding, scale = Gemma3TextScaledWordEmbedding, {"embed_scale": config.hidden_size**0.5}
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, self.padding_idx, **scale)
        self.layers = nn.ModuleList(
            [NSADecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = (NSARotaryEmbeddings if config.layer_rope_theta else LlamaRotaryEmbedding)(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(custom_intro=_FORWARD_INTRO)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NSAModelOutputWithPast:
        r"""
        past_key_values (`Cache`, *optional*):
            What earlier tokens left to be read, of `generate` or an earlier call; also taken as `cache`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if self.config.nsa_backend == "auto" and not torch.compiler.is_compiling():
            _warn_of_slow_path(inputs_embeds.device)

        shard: ContextShard | None = kwargs.pop("context_shard", None)
        if shard is not None:
            _check_parallel(self.config, attention_mask, past_key_values)
        else:
            _check_shapes(inputs_embeds, position_ids)
        masks = attention_mask if isinstance(attention_mask, dict) else None
        padding_mask = masks.get(NSA_LAYER_TYPE) if masks is not None else attention_mask
        if shard is None:
            cu_seqlens = packed_sequences(
                *inputs_embeds.shape[:2], padding_mask, position_ids, past_key_values, kwargs.get("cu_seq_lens_q")
            )
        # packed sequences are not cached: which row would a next token continue?
        packed = shard is not None or cu_seqlens is not None
        if use_cache and past_key_values is None and not packed:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            prepare_cache(past_key_values, self.config)

        if shard is not None:
            layout, position_ids, position_embeddings = build_parallel_layout(
                self.config, inputs_embeds, position_ids, shard, self.rotary_emb
            )
            masks = {}  # the layout says what each token sees
        else:
            layout, position_ids, position_embeddings = build_layout(
                self.config,
                inputs_embeds,
                padding_mask,
                position_ids,
                past_key_values,
                cu_seqlens,
                self.rotary_emb,
            )
        if masks is None:
            masks = _dense_masks(self.config, inputs_embeds, attention_mask, position_ids, past_key_values)

        ropes = split_ropes(position_embeddings, self.config.head_dim)
        hidden_states = inputs_embeds
        # `generate(assistant_early_exit=...)` lowers num_hidden_layers for a while
        layers = self.layers[: self.config.num_hidden_layers]
        for layer_type, decoder_layer in zip(self.config.layer_types, layers):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks.get(layer_type),
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=ropes[decoder_layer.self_attn.rope_index],
                layout=layout,
                **{CACHE_NAME: past_key_values},  # under its name, gradient checkpointing takes it away
                **kwargs,
            )
        return NSAModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: past_key_values if use_cache else None},
        )


def _check_shapes(inputs_embeds, position_ids):
    if inputs_embeds.dim() != 3:
        raise ValueError(
            "`input_ids` must have shape [batch, tokens], or `inputs_embeds` [batch, tokens, hidden_size], got "
            f"{list(inputs_embeds.shape)} after the embedding. Give one sequence a batch of 1, as `input_ids[None]`."
        )
    B, T = inputs_embeds.shape[:2]
    given = position_ids.shape if isinstance(position_ids, torch.Tensor) else type(position_ids).__name__
    if position_ids is not None and given not in ((B, T), (1, T)):
        shapes = f"[{B}, {T}] or [1, {T}]" if B > 1 else f"[1, {T}]"
        given = list(given) if isinstance(given, torch.Size) else given
        raise ValueError(f"`position_ids` must be a tensor {shapes}, one position per new token, got {given}.")


@functools.cache
def _warn_of_slow_path(device):
    """Say once why an accelerator runs the reference; on a CPU nothing else is expected."""
    if device.type != "cpu" and (reason := triton_error(device)) is not None:
        logger.warning(f"Native sparse attention runs its slow PyTorch reference, not its kernels: {reason}")


def _check_parallel(config, attention_mask, past_key_values):
    for name, value in {"attention_mask": attention_mask, "past_key_values": past_key_values}.items():
        if value is not None:
            raise ValueError(f"`context_shard` needs `{name}=None`, got {type(value).__name__}.")
    dense = sorted(set(config.layer_types) - {NSA_LAYER_TYPE})
    if dense and config._attn_implementation != "sdpa":
        raise ValueError(
            f"`attn_implementation` must be 'sdpa' where {' and '.join(dense)} layers run under context parallelism, "
            f"got {config._attn_implementation!r}. Call `model.set_attn_implementation('sdpa')`."
        )


def _dense_masks(config, inputs_embeds, attention_mask, position_ids, past_key_values):
    """Masks of the full and sliding layers, by layer type."""
    return {
        layer_type: _MASK_FUNCTIONS[layer_type](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
        )
        for layer_type in set(config.layer_types) - {NSA_LAYER_TYPE}
    }


@auto_docstring(custom_intro="The native sparse attention decoder with a language modeling head.")
class NSAForCausalLM(NSAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.model = NSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache_by_either_name
    @can_return_tuple
    @auto_docstring(custom_intro=_FORWARD_INTRO)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NSACausalLMOutputWithPast:
        r"""
        past_key_values (`Cache`, *optional*):
            What earlier tokens left to be read, of `generate` or an earlier call; also taken as `cache`.

        Example:

        ```python
        >>> import modeling_nsa  # registers the model type
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained("SmolLM2-135M-NSA")
        >>> tokenizer = AutoTokenizer.from_pretrained("SmolLM2-135M-NSA")
        >>> inputs = tokenizer("Gravity is", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return NSACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            block_indices=outputs.block_indices,
            gates=outputs.gates,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """As in transformers; padding behind real tokens repeats the last position, from which `generate` counts on."""
        if (mask := model_kwargs.get("attention_mask")) is not None and mask.dim() == 2:
            return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def get_compiled_call(self, compile_config):
        """As in transformers; without a configuration of your own, steps of `generate` on a GPU become a CUDA graph."""
        compiled = functools.partial(super().get_compiled_call, compile_config)
        own = compile_config or getattr(self.generation_config, "compile_config", None)
        if own is None and captures(self):
            return DecodeGraph(self, otherwise=compiled)
        return compiled()

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, whose paged cache has full and sliding layers only: sparse layers are refused.

        Raises:
            NotImplementedError: the model has sparse layers.
        """
        if NSA_LAYER_TYPE in self.config.layer_types:
            raise NotImplementedError(
                "generate_batch and continuous batching do not work with native sparse attention: the paged cache has "
                "no place for compressed keys. Use generate() on a padded batch; serve without continuous batching."
            )
        return super().init_continuous_batching(*args, **kwargs)

    @staticmethod
    @takes_cache_by_either_name
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ) -> dict[str, torch.Tensor | None]:
        """Masks by layer type for `generate` with a static cache, of shapes that stay the same from step to step."""
        masks = _dense_masks(config, inputs_embeds, attention_mask, position_ids, past_key_values)
        if NSA_LAYER_TYPE in config.layer_types:
            if attention_mask is not None:
                rows, width = attention_mask.shape
                whole = attention_mask.new_zeros(rows, max(width, past_key_values.get_max_length()), dtype=torch.bool)
                whole[:, :width] = attention_mask
                attention_mask = whole
            masks[NSA_LAYER_TYPE] = attention_mask
        return masks


def _without_extra_outputs(head):
    """A task head that refuses what its outputs have no place for."""
    forward = head.forward

    @functools.wraps(forward)  # Trainer reads the signature
    def checked(self, *args, **kwargs):
        for name in ("output_block_indices", "output_gates"):
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}` must be False for {type(self).__name__}, got {kwargs[name]}. Ask its "
                    f"`{self.base_model_prefix}`, the model without the head."
                )
        return forward(self, *args, **kwargs)

    head.forward = checked
    return head


@_without_extra_outputs
class NSAForSequenceClassification(GenericForSequenceClassification, NSAPreTrainedModel):
    """The native sparse attention decoder with a head that classifies a sequence by its last token."""


@_without_extra_outputs
class NSAForTokenClassification(GenericForTokenClassification, NSAPreTrainedModel):
    """The native sparse attention decoder with a head that classifies every token."""


@_without_extra_outputs
class NSAForQuestionAnswering(GenericForQuestionAnswering, NSAPreTrainedModel):
    """The native sparse attention decoder with a head for the start and end of an answer."""

    base_model_prefix = "transformer"


register_with_liger(NSAConfig.model_type)
