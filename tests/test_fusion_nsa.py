# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Fused projections: the model stays what it is, and nothing that happens to its parameters is missed."""

import copy
import io

import pytest
import torch
from tiny_nsa import BASE, close, every_variant, logits, make_ids, make_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, StaticCache

from modeling_nsa import NSAConfig, NSAForSequenceClassification, NSAModel, attention_nsa, fusion_nsa

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "k_proj_cmp", "v_proj_cmp", "k_proj_win", "v_proj_win")


def steps(model, ids, cache=None):
    """Logits of a prompt of 30 tokens, and of steps of several lengths."""
    cache, outputs = cache or DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in ids.split([30, 1, 5, 1, 12, 1], dim=1):
            outputs.append(model(part, past_key_values=cache).logits)
    return torch.cat(outputs, 1)


def fused_layers(model):
    """Layers whose weights lie side by side."""
    attentions = [module for module in model.modules() if isinstance(module, attention_nsa.NSADenseAttention)]
    parameters = [fusion_nsa._parameters(attention._linears())[0] for attention in attentions]
    return sum(fusion_nsa._joined(weights) is not None for weights in parameters)


def storage_bytes(model):
    storages = [x.untyped_storage() for x in model.parameters()]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


@pytest.fixture
def products(monkeypatch):
    """Layers of every product that took the place of several."""
    made, fused_linear = [], attention_nsa.fused_linear

    def record(x, linears):
        outputs = fused_linear(x, linears)
        if outputs is not None:
            made.append(list(linears))
        return outputs

    monkeypatch.setattr(attention_nsa, "fused_linear", record)
    return made


@every_variant
@pytest.mark.parametrize("v_head_dim", [None, 12])
@pytest.mark.parametrize("static", [False, True])
def test_fused_equals_separate(products, variant, v_head_dim, static):
    model, ids = make_model(variant, v_head_dim=v_head_dim), make_ids(2, 50)
    separate = copy.deepcopy(model)
    names, size = list(model.state_dict()), storage_bytes(model)
    assert model.fuse_projections() is model
    assert fused_layers(model) == 2
    assert list(model.state_dict()) == names
    assert storage_bytes(model) == size
    caches = [StaticCache(config=model.config, max_cache_len=64) if static else None for _ in range(2)]
    close(steps(model, ids, caches[0]), steps(separate, ids, caches[1]))
    assert len(products) == 5 * 2
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **settings, **more), separate.generate(ids, **settings, **more))


def test_every_class_has_it_and_every_projection_takes_part(products):
    config = NSAConfig(**{**BASE, "layer_types": ["full_attention", "native_sparse_attention"], "pad_token_id": 0})
    ids = make_ids(1, 1)
    for cls in (NSAModel, NSAForSequenceClassification):
        model = cls(config).eval().fuse_projections()
        with torch.no_grad():
            model(ids)
    assert products == [list(PROJECTIONS[:3]), [*PROJECTIONS, "gate.fc1"]] * 2


@pytest.mark.parametrize("attention_bias", [False, True])
def test_memory_is_one_tensor_a_layer(attention_bias):
    model = make_model(attention_bias=attention_bias).fuse_projections()
    attention = model.model.layers[0].self_attn
    linears = [getattr(attention, name) for name in PROJECTIONS] + [attention.gate.fc1]
    assert all(type(x) is nn.Parameter and x.is_leaf for linear in linears for x in linear.parameters())
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    rows = sum(linear.out_features for linear in linears)
    assert linears[0].weight.untyped_storage().nbytes() == rows * 32 * 4
    if attention_bias:
        assert linears[0].bias.untyped_storage().nbytes() == rows * 4
        assert linears[-1].bias.untyped_storage().data_ptr() == linears[0].bias.untyped_storage().data_ptr()


def test_products_are_for_few_tokens_without_gradients_or_autocast(products):
    model = make_model().fuse_projections()
    model(make_ids(1, 3))
    logits(model, make_ids(1, 17))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(make_ids(1, 3))
    assert products == []
    logits(model, make_ids(1, 16))
    with torch.inference_mode():
        model(make_ids(1, 1))
        close(logits(make_model().fuse_projections(), make_ids(1, 1)), logits(make_model(), make_ids(1, 1)))
    assert len(products) == 6


def test_changes_in_place_and_replaced_parameters_are_seen():
    """Whichever way weights change, the model computes what a fresh one with these weights computes."""
    model, ids = make_model().fuse_projections(), make_ids(1, 50)
    attention = model.model.layers[0].self_attn

    def assign():
        attention.gate.fc1.weight = nn.Parameter(torch.randn(16, 32))

    def data():  # as torch lays tensors side by side that were made apart
        attention.k_proj.weight.data = attention.k_proj_win.weight.data.clone()

    def swap():
        k, win = attention.k_proj.weight.data, attention.k_proj_win.weight.data
        attention.k_proj.weight.data, attention.k_proj_win.weight.data = win, k

    changes = [
        (lambda: attention.v_proj.weight.data.mul_(2), 2),
        (lambda: model.load_state_dict(make_model(seed=1).state_dict()), 2),
        (swap, 1),
        (data, 1),
        (assign, 1),
        (lambda: model.load_state_dict(make_model(seed=2).state_dict(), assign=True), 0),
    ]
    before = steps(model, ids)
    for change, fused in changes:
        change()
        assert fused_layers(model) == fused
        fresh = make_model()
        fresh.load_state_dict(model.state_dict())
        now = steps(model, ids)
        close(now, steps(fresh, ids))
        assert (now - before).abs().max() > 1e-3
        before = now
    assert fused_layers(model.fuse_projections()) == 2
    close(steps(model, ids), before)


def test_a_compiled_model_sees_them_too():
    model, ids = make_model().fuse_projections(), make_ids(1, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    attention = model.model.layers[0].self_attn
    for change in (
        lambda: None,
        lambda: attention.q_proj.weight.data.mul_(2),
        lambda: setattr(attention.v_proj.weight, "data", torch.randn(16, 32)),
        lambda: setattr(attention.v_proj, "weight", nn.Parameter(torch.randn(16, 32))),
    ):
        change()
        fresh = make_model()
        fresh.load_state_dict(model.state_dict())
        close(logits(compiled, ids), logits(fresh, ids))


@pytest.mark.parametrize("variant, biases", [("separate", False), ("qwen3-like", True), ("hybrid", False)])
def test_a_compiled_layer_has_one_product(variant, biases):
    model, graphs = make_model(variant).fuse_projections(), []
    layer = model.model.layers[0].self_attn

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def project(x):
        return layer._project(x)

    @torch.compile(fullgraph=True, backend=keep)
    def forward(ids):
        return model(ids, use_cache=False).logits

    with torch.no_grad():
        project(torch.randn(1, 1, 32))
        forward(make_ids(1, 1))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    (alone, whole) = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    assert [name for name in alone if "linear" in name] == ["modeling_nsa.fused_linear.default"]
    assert whole.count("modeling_nsa.fused_linear.default") == 2
    assert "data_ptr" not in " ".join(targets)
    added = sum("add" in name for name in alone)
    assert added == (0 if biases or variant == "hybrid" else 1)  # the bias of the gates alone is added afterwards


@pytest.mark.slow
def test_compiled_by_inductor_with_a_static_cache():
    model, ids = make_model("qwen3-like").fuse_projections(), make_ids(1, 40)
    cache, expected = StaticCache(config=model.config, max_cache_len=64), logits(make_model("qwen3-like"), ids)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        model(ids[:, :37], past_key_values=cache)
        for t in range(37, 40):
            close(compiled(ids[:, t : t + 1], past_key_values=cache).logits[:, 0], expected[:, t])


def test_opcheck():
    x, weights, biases = torch.randn(2, 3, 8), torch.randn(7, 8).split([3, 4]), torch.randn(7).split([3, 4])
    for given in (weights, [weight.clone() for weight in weights]):
        torch.library.opcheck(fusion_nsa._fused_linear, (x, list(given), []))
        torch.library.opcheck(fusion_nsa._fused_linear, (x, list(given), list(biases)))


def test_moves_and_conversions_fuse_again():
    model, ids = make_model().fuse_projections(), make_ids(1, 50)
    expected, size = steps(model, ids), storage_bytes(model)
    model.to(torch.float64)
    assert (fused_layers(model), storage_bytes(model)) == (2, 2 * size)
    close(steps(model, ids).float(), expected)
    model.float().requires_grad_(False)
    assert (fused_layers(model), storage_bytes(model)) == (2, size)
    model.to("meta")
    assert logits(model, ids[:, :1].to("meta")).is_meta
    state = make_model().state_dict()
    model.to_empty(device="cpu")
    assert fused_layers(model) == 2
    model.load_state_dict(state)
    model.model.rotary_emb = make_model().model.rotary_emb  # its buffers are in no state dict
    close(steps(model, ids), expected)


def test_copies_are_fused_and_their_own():
    model, ids = make_model().fuse_projections(), make_ids(1, 50)
    expected, size = steps(model, ids), storage_bytes(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert (fused_layers(twin), storage_bytes(twin)) == (2, size)
        close(steps(twin, ids), expected)
        twin.model.layers[0].self_attn.q_proj.weight.data.zero_()
        close(steps(model, ids), expected)


@pytest.mark.parametrize("variant", ["separate", "qwen3-like", "hybrid"])
def test_save_and_load(tmp_path, variant):
    model = make_model(variant)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.fuse_projections().save_pretrained(tmp_path)
    assert fused_layers(model) == 2
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where) for where in (None, "cpu")):
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
        ids = make_ids(1, 50)
        close(steps(loaded.fuse_projections(), ids), steps(model, ids))
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert fused_layers(head.fuse_projections()) == 2


def test_offloaded_weights_are_left_to_their_hooks(products):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_model(), make_ids(1, 50)
    expected = steps(model, ids)
    accelerate.cpu_offload(model.fuse_projections(), execution_device=torch.device("cpu"))
    close(steps(model, ids), expected)
    assert products == []
    with pytest.raises(ValueError, match=r"plain nn\.Linear, without hooks, .* got e\.g\. Linear on meta"):
        model.fuse_projections()


@pytest.mark.parametrize("use_reentrant", [False, True, None])
def test_training_changes_the_weights_that_are_fused(products, use_reentrant):
    ids, results = make_ids(2, 12), []
    for fuse in (False, True):
        model = make_model("qwen3-like").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if fuse:
            model.fuse_projections()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for _ in range(2):
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        assert fused_layers(model) == (2 if fuse else 0)
        results.append(logits(model.eval(), ids))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert products


@pytest.mark.parametrize("first", ["fuse", "adapter"])
def test_adapters_turn_it_off_and_merging_on(products, first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj_cmp"], modules_to_save=["self_attn.gate"], r=2,
        init_lora_weights=False,
    )  # fmt: skip
    model, ids = make_model("hybrid"), make_ids(1, 50)
    if first == "fuse":
        model.fuse_projections()
    adapted = peft.get_peft_model(model, config).eval()
    if first == "adapter":
        with pytest.raises(ValueError, match="merge adapters first"):
            adapted.fuse_projections()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    expected = logits(adapted, ids)
    close(steps(adapted, ids), expected)
    assert products == []
    merged = adapted.merge_and_unload(safe_merge=True)
    close(steps(merged, ids), expected)
    assert bool(products) == (first == "fuse")
    close(steps(merged.fuse_projections(), ids), expected)
    assert fused_layers(merged) == 2


def test_layers_that_cannot_be_fused_stay_as_they_are(products):
    model, ids = make_model(), make_ids(1, 50)

    class Other(nn.Linear):
        pass

    tied, other = (layer.self_attn for layer in model.model.layers)
    tied.k_proj_cmp.weight = tied.k_proj.weight
    other.q_proj.__class__ = Other
    expected = steps(model, ids)
    with pytest.raises(ValueError, match=r"`fuse_projections` needs a layer whose projections are plain nn\.Linear"):
        model.fuse_projections()
    other.q_proj.__class__ = nn.Linear
    close(steps(model.fuse_projections(), ids), expected)
    assert fused_layers(model) == 1
    assert tied.k_proj_cmp.weight is tied.k_proj.weight
    assert len(products) == 5
