# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the Native Sparse Attention decoder."""

import os
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from nsa_kernels.interface import BACKENDS
from nsa_kernels.validation import check_sizes

from .hub_nsa import AUTO_MAP, write_remote_code

__all__ = ["COMPRESS_TYPES", "DECODER_TYPES", "LAYER_TYPES", "NSAConfig"]

NSA_LAYER_TYPE = "native_sparse_attention"
LAYER_TYPES = (NSA_LAYER_TYPE, "full_attention", "sliding_attention")
COMPRESS_TYPES = ("mean", "mlp", "residual_mlp", "pool")
DECODER_TYPES = ("llama", "gemma3")

_PER_LAYER = ("layer_types", "no_rope_layers", "layer_rope_theta")

# configs read through the base class (Trainer resuming a checkpoint) know only the library's own layer types
if NSA_LAYER_TYPE not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES:
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES += (NSA_LAYER_TYPE,)


@strict
class NSAConfig(PreTrainedConfig):
    r"""
    Configuration of [`NSAModel`]: a decoder like Llama or Gemma 3 whose layers attend by Native Sparse Attention
    (arXiv 2502.11089), fully, or in a sliding window. The defaults of the sparse part are the paper's.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, hidden_act, max_position_embeddings,
        initializer_range, rms_norm_eps, use_cache, tie_word_embeddings, rope_parameters, attention_dropout, mlp_bias:
            As in [`~transformers.LlamaConfig`]. Attention dropout acts in full and sliding layers only.
        decoder_type (`str`, defaults to `"llama"`):
            `"llama"`, or `"gemma3"`: RMSNorm multiplies by 1 + weight and follows attention and MLP too, and embeddings
            are multiplied by the root of `hidden_size`.
        num_attention_heads (`int`, defaults to 32):
            Query heads, HQ.
        num_key_value_heads (`int`, *optional*):
            Key/value heads, H; divides HQ. Defaults to HQ.
        head_dim (`int`, *optional*):
            Query/key head dim, D. Defaults to `hidden_size // num_attention_heads`.
        v_head_dim (`int`, *optional*):
            Value head dim, DV. Defaults to `head_dim`.
        attention_bias (`bool`, defaults to `False`):
            Biases of the query, key and value projections.
        attention_output_bias (`bool`, defaults to `False`):
            Bias of the output projection.
        query_pre_attn_scalar (`float`, *optional*):
            Products of queries and keys are divided by its root. Defaults to `head_dim`.
        final_logit_softcapping (`float`, *optional*):
            c in `c * tanh(logits / c)`, which replaces the logits. Defaults to leaving them as they are.
        use_qk_norm (`bool`, defaults to `False`):
            RMSNorm over the head dim of queries and keys before RoPE, as in Qwen3; each branch has its own key norm.
        no_rope_layers (`list[int]`, *optional*):
            One entry per layer, 1 with RoPE and 0 without, as in SmolLM3. Defaults to RoPE everywhere.
        layer_rope_theta (`list[float | None]`, *optional*):
            One entry per layer: the base of an unscaled RoPE of its own, as in Gemma 3's sliding layers, or None for
            `rope_parameters`. Defaults to `rope_parameters` everywhere.
        layer_types (`list[str]`, *optional*):
            One of `"native_sparse_attention"`, `"full_attention"`, `"sliding_attention"` per layer. Defaults to
            native sparse attention everywhere.
        sliding_window (`int`, *optional*):
            Window in tokens of the `"sliding_attention"` layers. Has no effect on the others.
        compress_block_size (`int`, defaults to 32):
            l: tokens pooled into one compressed key/value.
        compress_stride (`int`, defaults to 16):
            d: tokens between the starts of two compression blocks. Divides l and l'.
        compress_type (`str`, defaults to `"residual_mlp"`):
            φ: `"mean"` of the block's (rotated) keys and values, the paper's `"mlp"` over keys before RoPE and values,
            `"residual_mlp"`, their sum, or `"pool"`, a mean with weights that depend on the content of the block. One φ
            for keys and one for values, alike for every head.
        compress_hidden_size (`int`, *optional*):
            Hidden units of φ. Defaults to `2 * head_dim`.
        select_block_size (`int`, defaults to 64):
            l': tokens of one selectable block.
        num_selected_blocks (`int`, defaults to 16):
            n: blocks a query attends to, the forced ones included.
        num_initial_blocks (`int`, defaults to 1):
            Forced blocks at the start of the sequence.
        num_local_blocks (`int`, defaults to 2):
            Forced blocks up to and including the query's own.
        window_size (`int`, defaults to 512):
            w: tokens of the window branch.
        shared_kv (`bool`, defaults to `False`):
            One key/value projection for all three branches instead of one each.
        gate_hidden_size (`int`, *optional*):
            Hidden units of the gate MLP. Defaults to `2 * head_dim`.
        gate_scale (`bool`, defaults to `False`):
            Multiply the gates by a learned scale per key/value head and branch, as converted models do.
        nsa_backend (`str`, defaults to `"auto"`):
            Implementation of the sparse layers: `"auto"`, `"triton"` or `"reference"`. `attn_implementation` governs
            the full and sliding layers.
        save_remote_code (`bool`, defaults to `True`):
            Let `save_pretrained` and `push_to_hub` put the model's code beside the weights, so that
            `trust_remote_code=True` loads it where this package is not installed.

    Raises:
        ValueError: Names the field, what it must satisfy, and the value given.

    ```python
    >>> from modeling_nsa import NSAConfig, NSAForCausalLM

    >>> config = NSAConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=4)
    >>> model = NSAForCausalLM(config)
    ```
    """

    model_type = NSA_LAYER_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    decoder_type: str = "llama"
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    query_pre_attn_scalar: float | int | None = None
    final_logit_softcapping: float | int | None = None
    mlp_bias: bool = False
    use_qk_norm: bool = False
    no_rope_layers: list[int] | None = None
    layer_rope_theta: list[float | int | None] | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    compress_block_size: int = 32
    compress_stride: int = 16
    compress_type: str = "residual_mlp"
    compress_hidden_size: int | None = None
    select_block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    shared_kv: bool = False
    gate_hidden_size: int | None = None
    gate_scale: bool = False
    nsa_backend: str = "auto"
    save_remote_code: bool = True

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = [NSA_LAYER_TYPE] * self.num_hidden_layers
        # `strict` wraps what validators raise in an error of its own: raise the plain ValueError first
        self.validate_architecture()
        self.validate_layer_type()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        self._check_rope()

    @property
    def block_sizes(self) -> dict[str, int]:
        """The sizes that `nsa_kernels.nsa_attention` takes."""
        return {
            "compress_block_size": self.compress_block_size,
            "compress_stride": self.compress_stride,
            "select_block_size": self.select_block_size,
            "num_selected_blocks": self.num_selected_blocks,
            "num_initial_blocks": self.num_initial_blocks,
            "num_local_blocks": self.num_local_blocks,
            "window_size": self.window_size,
        }

    @property
    def rope_thetas(self) -> list[float | None]:
        """The bases of the model's RoPEs, None for that of `rope_parameters`."""
        return list(dict.fromkeys(self.layer_rope_theta or [None]))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As in transformers; the model's code goes into the directory too, unless `save_remote_code` is off."""
        if self.save_remote_code and not os.path.isfile(save_directory):
            write_remote_code(save_directory)
            self.auto_map = dict(AUTO_MAP)
        elif self._auto_class is None:  # a class that was loaded as remote code is always saved with it
            self.__dict__.pop("auto_map", None)
        for name in _PER_LAYER:  # `from_pretrained(..., num_hidden_layers=...)` may have left more
            if (entries := getattr(self, name)) is not None:
                setattr(self, name, entries[: self.num_hidden_layers])
        super().save_pretrained(save_directory)
        if push_to_hub:  # transformers uploads what is newer than the start of its own `save_pretrained`
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Only modules that this configuration has: unmatched entries are an error."""
        attention = "layers.*.self_attn"
        plan = {f"{attention}.{name}_proj": "colwise" for name in "qkv"}
        plan[f"{attention}.o_proj"] = "rowwise"
        # every rank sees its own heads only, so that the gradient of what heads share is a partial sum
        shared = ["q_norm", "k_norm"] if self.use_qk_norm else []
        if NSA_LAYER_TYPE in self.layer_types:
            plan[f"{attention}.gate.fc2"] = "colwise"
            if self.gate_scale:
                plan[f"{attention}.gate_scale"] = "colwise"
            if self.compress_type != "mean":
                shared += ["compress_k", "compress_v"]
            if not self.shared_kv:
                plan |= {f"{attention}.{name}_proj_{branch}": "colwise" for branch in ("cmp", "win") for name in "kv"}
                shared += ["k_norm_cmp", "k_norm_win"] if self.use_qk_norm else []
        plan |= {f"{attention}.{name}": "replicated_with_grad_allreduce" for name in shared}
        plan |= {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise"}
        plan["layers.*.mlp.down_proj"] = "rowwise"
        return plan

    def validate_architecture(self):
        """Part of `@strict` validation: heads, block sizes and the choices among names."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in (*sizes, "head_dim", "v_head_dim", "compress_hidden_size", "gate_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value}.")
        for name in ("query_pre_attn_scalar", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be a positive number, got {value}.")
        if self.rms_norm_eps < 0:
            raise ValueError(f"`rms_norm_eps` must be a number >= 0, got {self.rms_norm_eps}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, so that every group has the same "
                f"number of query heads, got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        check_sizes(**self.block_sizes)
        choices = {"decoder_type": DECODER_TYPES, "compress_type": COMPRESS_TYPES, "nsa_backend": BACKENDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def _check_rope(self):
        rope = self.rope_parameters or {}
        factor = rope.get("partial_rotary_factor")
        # a "proportional" RoPE has angles of 0 for the rest of a head, the others do without
        if factor not in (None, 1.0) and rope.get("rope_type") != "proportional":
            raise ValueError(
                "`rope_parameters` must rotate whole heads, `partial_rotary_factor` 1.0 or left out, got "
                f"{factor}: part of a head without RoPE is not implemented."
            )

    def validate_layer_type(self):
        """Part of `@strict` validation: known layer types, one per layer."""
        unknown = [name for name in self.layer_types if name not in LAYER_TYPES]
        if unknown:
            raise ValueError(f"`layer_types` must hold only {', '.join(LAYER_TYPES)}, got {unknown}.")
        for name in _PER_LAYER:
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must have one entry per layer, got {len(entries)} for num_hidden_layers="
                    f"{self.num_hidden_layers}."
                )
        if any(entry not in (0, 1) for entry in self.no_rope_layers or []):
            raise ValueError(f"`no_rope_layers` must hold only 0 (no RoPE) and 1 (RoPE), got {self.no_rope_layers}.")
        if any(theta is not None and theta <= 0 for theta in self.layer_rope_theta or []):
            raise ValueError(f"`layer_rope_theta` must hold positive numbers or None, got {self.layer_rope_theta}.")
        if "sliding_attention" in self.layer_types and (self.sliding_window or 0) < 1:
            raise ValueError(
                "`sliding_window` must be a positive number of tokens when `layer_types` holds 'sliding_attention', "
                f"got {self.sliding_window}."
            )
