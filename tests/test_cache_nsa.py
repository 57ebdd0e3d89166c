# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The cache layers: memory, growth, and every lifecycle method."""

import copy
import functools
import operator
import re

import pytest
import torch
from tiny_nsa import close, every_variant, logits, make_ids, make_model, sparse_variants
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache, StaticCache

from modeling_nsa import NSAConfig, NSADynamicLayer, NSAForCausalLM, NSAStaticLayer
from modeling_nsa.cache_nsa import NSACacheInput
from modeling_nsa.layout_nsa import NSALayout, _set_blocks


def fill(model, ids, recording=False):
    cache = DynamicCache(config=model.config)
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@torch.no_grad()
def step(model, ids, cache):
    return model(ids, past_key_values=cache).logits


def test_layers_register_themselves():
    config = NSAConfig(num_hidden_layers=2, layer_types=["native_sparse_attention", "full_attention"])
    dynamic, static = DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)
    assert [type(layer).__name__ for layer in dynamic.layers] == ["NSADynamicLayer", "DynamicLayer"]
    assert [type(layer).__name__ for layer in static.layers] == ["NSAStaticLayer", "StaticLayer"]
    assert NSADynamicLayer._layer_type == NSAStaticLayer._layer_type == "native_sparse_attention"


@sparse_variants
@pytest.mark.parametrize("removed", [1, 2, 9, 20, 39])
def test_crop_forgets_tokens_without_a_trace(variant, removed):
    model, ids = make_model(variant), make_ids(2, 70)
    cache = fill(model, ids[:, :30], recording=True)
    step(model, ids[:, 30:41], cache)
    cache.crop(-removed)
    kept = 41 - removed
    assert cache.get_seq_length() == kept
    close(step(model, ids[:, kept:], cache), logits(model, ids)[:, kept:])


def test_crop_beyond_what_is_held_raises_or_rebuilds():
    separate, shared, ids = make_model(), make_model("shared"), make_ids(1, 50)
    cache = fill(separate, ids[:, :40])
    with pytest.raises(RuntimeError, match=r"cannot remove 5 of 40 tokens.*activate_past_recording"):
        cache.crop(-5)
    close(step(separate, ids[:, 40:], cache), logits(separate, ids)[:, 40:])  # nothing was changed
    cache = fill(shared, ids[:, :40])
    cache.crop(-15)
    close(step(shared, ids[:, 25:], cache), logits(shared, ids)[:, 25:])


@pytest.mark.parametrize("variant", ["separate", "shared"])
def test_recording_keeps_no_more_after_a_crop(variant):
    model, ids = make_model(variant), make_ids(1, 64)
    cache = fill(model, ids, recording=True)
    cache.crop(0)
    layer = cache.layers[0]
    assert layer.v_tail.shape[2] == 7
    assert layer.k_win is None or layer.k_win.shape[2] == 10


@every_variant
def test_beams_batches_and_offloading(variant):
    model, ids = make_model(variant), make_ids(3, 40)
    expected = logits(model, ids)
    order = torch.tensor([2, 0, 0])
    cache = fill(model, ids[:, :30])
    cache.reorder_cache(order)
    close(step(model, ids[order, 30:], cache), expected[order, 30:])
    cache = fill(model, ids[:, :30])
    cache.batch_repeat_interleave(2)
    close(step(model, ids[:, 30:].repeat_interleave(2, 0), cache), expected[:, 30:].repeat_interleave(2, 0))
    cache = fill(model, ids[:, :30])
    cache.batch_select_indices(torch.tensor([1]))
    close(step(model, ids[1:2, 30:], cache), expected[1:2, 30:])
    cache = fill(model, ids[:, :30])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    close(step(model, ids[:, 30:], cache), expected[:, 30:])
    static = StaticCache(config=model.config, max_cache_len=40)
    for _ in range(2):
        step(model, ids[:, :30], static)
        static.reorder_cache(order)
        close(step(model, ids[order, 30:], static), expected[order, 30:])
        static.reset()


def test_what_is_moved_or_copied_is_not_held_twice():
    model, ids = make_model(), make_ids(2, 40)
    order = torch.tensor([1, 0])
    for move in (
        lambda layer: layer.offload(),
        lambda layer: layer.reorder_cache(order),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(order),
    ):
        cache = fill(model, ids[:, :30])
        step(model, ids[:, 30:31], cache)
        layer = cache.layers[0]
        assert {"keys", "values", "k_win", "v_tail"} <= layer._buffers.keys()
        move(layer)
        assert not layer._buffers


@pytest.mark.parametrize("variant, recording", [("separate", True), ("shared", True), ("shared", False)])
def test_right_padded_rows_are_cropped_by_column(variant, recording):
    model, ids = make_model(variant), make_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 11:20] = 0  # nine columns of padding between the real tokens of row 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    if recording:
        cache.activate_past_recording()
    late = []
    with torch.no_grad():
        for start, stop, removed in ((0, 20, 3), (17, 30, 4), (26, 40, 0)):  # the second part starts with padding
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache,
            )  # fmt: skip
            late.append(out.logits[:, max(0, 20 - start) : stop - start - removed])
            cache.crop(-removed)
    expected = logits(model, torch.cat((ids[1:, :11], ids[1:, 20:]), 1))[0, 11:]
    close(torch.cat((late[1][1], late[2][1])), expected)
    close(torch.cat((late[1][0], late[2][0])), logits(model, ids[:1])[0, 20:])


@pytest.mark.parametrize("variant", ["separate", "shared", "hybrid"])
@pytest.mark.parametrize("padding", [0, 3])
def test_what_inference_mode_filled_goes_on_outside_it_and_back(variant, padding):
    model, ids = make_model(variant), make_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache, outputs = DynamicCache(config=model.config), []
    modes = torch.inference_mode, torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode
    for mode, (start, stop) in zip(modes, ((0, 30), (30, 31), (31, 33), (33, 34), (34, 60)), strict=True):
        with mode():
            output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            outputs.append(output.logits.detach().clone())
    real = mask.bool()
    close(torch.cat(outputs, 1)[real], logits(model, ids, attention_mask=mask)[real])


SMALL = {"head_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("trained", ["q_proj", "gate.fc2", "compress_k.w1", "k_proj."])
def test_gradients_through_chunks_equal_those_of_one_pass(trained):
    """Frozen keys and values are read by the backward pass of each chunk, so that the next must not write to them."""
    model, ids, grads = make_model(nsa_backend="triton", **SMALL), make_ids(2, 30), []
    (parameter,) = [x for name, x in model.requires_grad_(False).named_parameters() if trained in name][:1]
    parameter.requires_grad_()
    for lengths in ([30], [20, 8, 1, 1]):
        cache = DynamicCache(config=model.config)
        chunks = [model(part, past_key_values=cache).logits for part in ids.split(lengths, dim=1)]
        torch.cat(chunks, 1).square().mean().backward()
        grads.append(parameter.grad)
        parameter.grad = None
    assert grads[0].abs().max() > 0
    close(grads[1], grads[0])


def test_frozen_weights_grow_in_place_without_no_grad():
    model, ids = make_model(**SMALL).requires_grad_(False), make_ids(1, 70)
    cache = fill(model, ids[:, :66])
    model(ids[:, 66:67], past_key_values=cache)
    before = cache.layers[0].keys.data_ptr()
    model(ids[:, 67:68], past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == before


def test_a_copy_is_independent():
    model, ids = make_model(), make_ids(1, 60)
    cache = fill(model, ids[:, :30])
    step(model, ids[:, 30:31], cache)
    prefix = copy.deepcopy(cache)
    step(model, make_ids(1, 20, seed=9), cache)
    close(step(model, ids[:, 31:], prefix), logits(model, ids)[:, 31:])


@pytest.mark.parametrize("shared_kv", [False, True])
def test_memory_stays_below_110_percent_of_dense(shared_kv):
    """At the paper's sizes: allocated bytes, growth by single tokens included."""
    config = NSAConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        shared_kv=shared_kv, max_position_embeddings=20000,
    )  # fmt: skip
    model, length = NSAForCausalLM(config).eval(), 16384
    cache = fill(model, torch.zeros(1, length, dtype=torch.long))
    for _ in range(3):
        step(model, torch.zeros(1, 1, dtype=torch.long), cache)
    layer = cache.layers[0]
    tensors = [layer.keys, layer.values, *(getattr(layer, name) for name in layer.state_names)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
    dense = 2 * (length + 3) * 16 * 4
    window = 0 if shared_kv else 512 / length
    assert 1.06 < sum(storages.values()) / dense < (1 + 1 / 16 + window) * (1 + 1 / 64) + 0.01
    before = layer.keys.data_ptr()
    step(model, torch.zeros(1, 1, dtype=torch.long), cache)
    assert layer.keys.data_ptr() == before  # appended in place


def test_filled_plain_layers_are_rebuilt_or_refused():
    """PEFT's prefix tuning and a user's own DynamicCache hand over plain layers."""
    shared, separate, ids = make_model("shared"), make_model(), make_ids(1, 45)
    full = fill(shared, ids[:, :30])
    plain = DynamicCache()
    for index, layer in enumerate(full.layers):
        plain.update(layer.keys.clone(), layer.values.clone(), index)
    close(step(shared, ids[:, 30:], plain), logits(shared, ids)[:, 30:])
    plain = DynamicCache()
    for index, layer in enumerate(fill(separate, ids[:, :30]).layers):
        plain.update(layer.keys.clone(), layer.values.clone(), index)
    with pytest.raises(ValueError, match=r"Layer 0 got 30 cached tokens.*prefix tuning needs.*shared_kv=True"):
        step(separate, ids[:, 30:], plain)


def test_caches_of_another_model_are_refused():
    model, one, hybrid, ids = make_model(), make_model(num_hidden_layers=1), make_model("hybrid"), make_ids(1, 20)
    for cache in (fill(one, ids), StaticCache(config=one.config, max_cache_len=40)):
        with pytest.raises(ValueError, match="`past_key_values` must have the model's 2 layers, got 1"):
            step(model, ids, cache)
    for cache in (((ids, ids),) * 2, EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(ValueError, match=f"must be a cache of a decoder, got {type(cache).__name__}. Use `Dynamic"):
            step(model, ids, cache)
    with pytest.raises(ValueError, match="Layer 0 is a full_attention layer and cannot use a NSADynamicLayer"):
        step(hybrid, ids, fill(model, ids))


@pytest.mark.parametrize("leftpad", [None, [0, 3, 5]])
def test_compression_runs_only_when_a_block_completes(monkeypatch, leftpad):
    rows = 1 if leftpad is None else len(leftpad)
    model, ids = make_model(), make_ids(rows, 60)
    mask = None
    if leftpad is not None:
        mask = (torch.arange(60) >= torch.tensor(leftpad)[:, None]).long()
    counted = []
    compress = model.model.layers[0].self_attn.compress_k
    forward = compress.forward
    monkeypatch.setattr(
        compress, "forward", lambda *args, **kwargs: counted.append(kwargs["num_blocks"]) or forward(*args, **kwargs)
    )
    cache, outputs = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in ((0, 30), *((t, t + 1) for t in range(30, 60))):
            seen = None if mask is None else mask[:, :stop]
            outputs.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    completing = {t for t in range(30, 60) for pad in leftpad or [0] if (t + 1 - pad) % 4 == 0}  # l = 8, d = 4
    assert counted == [6, *[1] * len(completing)]
    real = slice(None) if mask is None else mask.bool()
    close(torch.cat(outputs, 1)[real], logits(model, ids, attention_mask=mask)[real])


class CopiedElements(TorchDispatchMode):
    """Counts the elements that are copied or joined."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ in ("copy_", "cat", "clone"):
            self.count += result.numel()
        return result


@pytest.mark.parametrize("leftpad", [None, torch.tensor([0, 3])])
def test_growth_is_in_small_steps_and_copies_in_proportion(leftpad):
    """Token by token: allocated is at most 2 % more than needed; copies grow with the tokens, not with their square."""
    layer, new, copied = NSADynamicLayer(), torch.zeros(2, 1, 1, 4), []

    def compress(tails, first_slot, num_blocks, embeddings):
        return new.new_zeros(2, 1, num_blocks, 4), new.new_zeros(2, 1, num_blocks, 4)

    for start, stop in ((0, 1024), (1024, 2048), (2048, 4096)):
        with CopiedElements() as counter:
            for past in range(start, stop):
                layout = NSALayout(past, 1, 8, 4, leftpad=leftpad)
                _set_blocks(layout)
                tails = {"k_tail_rot": new, "v_tail": new}
                layer.update(new, new, nsa=NSACacheInput(layout, tails, new, new, compress, None, window_size=16))
        copied.append(counter.count)
        for name, needed in (("keys", stop), ("v_cmp", (stop - 8) // 4 + 1), ("k_win", 24), ("v_tail", 15)):
            held = getattr(layer, name).untyped_storage().nbytes() // (new.nbytes)
            assert needed // 2 < held <= needed * 1.02 + 2, name
    assert copied[2] < 2.4 * copied[1]


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: values read back, shapes that depend on them, lists copied."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        from_list = name == "lift_fresh" and args[0].dim() > 0
        waits = name in self.refused or by_mask or from_list
        assert not waits, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["separate", "shared", "mlp", "qwen3-like"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_with_a_static_cache_never_waits_for_the_device(variant, padded):
    model, ids = make_model(variant), make_ids(2, 40)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :5] = not padded
    mask[:, 40:] = False
    cache = StaticCache(config=model.config, max_cache_len=64)
    outputs = []
    with torch.no_grad():
        for start, stop in ((0, 30), (30, 31), (31, 34), (34, 35), (35, 40)):
            seen = mask & (torch.arange(64) < stop) if padded else None
            with NoWaiting() if start else torch.no_grad():
                outputs.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    expected = logits(model, ids, attention_mask=mask[:, :40].long())
    real = mask[:, :40]
    close(torch.cat(outputs, 1)[real], expected[real])


def test_padding_behind_cached_tokens_is_refused_by_a_static_cache():
    model, ids = make_model(), make_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    for width in (1, 17):
        cache = StaticCache(config=model.config, max_cache_len=64)
        step(model, ids[:, :10], cache)
        with pytest.raises((ValueError, RuntimeError), match="padding behind real tokens that a static cache"):
            model(ids[:, :width], attention_mask=mask[:, : 10 + width], past_key_values=cache)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_steps_are_one_graph_that_is_never_compiled_again(backend):
    """As `generate` does with a static cache; ragged rows."""
    torch._dynamo.reset()
    model, ids = make_model(nsa_backend=backend, **SMALL), make_ids(2, 34)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :5] = mask[:, 34:] = False
    cache, made = StaticCache(config=model.config, max_cache_len=64), []

    def record(graph, inputs):
        made.extend((node.target, tuple(node.meta["val"].shape)) for node in graph.graph.nodes
                    if isinstance(node.meta.get("val"), torch.Tensor) and node.op == "call_function")  # fmt: skip
        return make_boxed_func(graph.forward)

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        outputs = [model(ids[:, :30], attention_mask=mask & (torch.arange(64) < 30), past_key_values=cache).logits]
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=record), fullgraph=True)
        for t in range(30, 34):
            seen = mask & (torch.arange(64) <= t)
            outputs.append(compiled(ids[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits)
    expected = logits(model, ids, attention_mask=mask[:, :34].long())
    close(torch.cat(outputs, 1)[mask[:, :34]], expected[mask[:, :34]])
    if backend == "triton":  # one operation writes all of them; anything else would copy them
        layer = cache.layers[0]
        held = {tuple(x.shape) for x in (layer.keys, layer.k_cmp, layer.k_win, layer.k_tail)}
        targets = {target for target, shape in made if shape in held}
        assert targets == {operator.getitem}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3-like", "shared"])
def test_compiled_code_writes_in_place_and_shares_what_layers_have_in_common(variant):
    """The operation that writes gets the cache itself, not copies; rotations, slots and padding are computed once."""
    torch._dynamo.reset()
    small = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "v_head_dim": 16}
    model, ids = make_model(variant, nsa_backend="triton", **small), make_ids(2, 31)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :5] = mask[:, 31:] = False
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids[:, :30], attention_mask=mask & (torch.arange(64) < 30), past_key_values=cache)
        compiled = torch.compile(model, fullgraph=True)
        step = functools.partial(compiled, ids[:, 30:], attention_mask=mask, past_key_values=cache)
        output, (code,) = run_and_get_code(step)
    close(output.logits[:, -1], logits(model, ids, attention_mask=mask[:, :31].long())[:, -1])
    calls = [line for line in code.splitlines() if re.search(r"= torch\.ops\.\w+\.append_tokens\.default", line)]
    read, written = (
        [set(re.findall(r"\bbuf\d+\b", call.partition("default(")[2].rpartition("], ")[i])) for call in calls]
        for i in (0, 2)
    )
    assert len(read[0] & read[1]) == 4  # cos, sin, slots and padding
    # the first layer's length is read by all layers
    assert [len(buffers) for buffers in written] == [1, 0]


def test_generate_compiles_a_static_cache_once():
    torch._dynamo.reset()
    small = {"head_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, ids = make_model(**small), make_ids(2, 41)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **settings)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    # in whole, and for the kernels that need the place of a long chunk as a number
    for fullgraph, chunk in ((True, None), (False, 20)):
        config = CompileConfig(backend="eager", mode=None, fullgraph=fullgraph)
        config._compile_all_devices = True
        static = {"cache_implementation": "static", "compile_config": config, "prefill_chunk_size": chunk}
        assert torch.equal(model.generate(ids, attention_mask=mask, **static, **settings), expected)
        assert chunk or graphs["unique_graphs"] == 1
