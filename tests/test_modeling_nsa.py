# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The model's invariants: causality, padding, packing, caches, generate, saving, gradients."""

import copy
import inspect
import logging
import warnings

import pytest
import torch
from packaging.version import Version
from tiny_nsa import BASE, close, every_variant, logits, main_variants, make_ids, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    DynamicCache,
    StaticCache,
)
from transformers.utils import logging as transformers_logging

import modeling_nsa
from modeling_nsa import NSAConfig, NSAForCausalLM, attention_nsa
from modeling_nsa.cache_nsa import CACHE_NAME


@every_variant
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cached_equals_uncached_however_it_is_chunked(variant, implementation):
    model, ids = make_model(variant), make_ids(2, 60)
    if implementation == "static":
        cache = StaticCache(config=model.config, max_cache_len=64)
    else:
        cache = DynamicCache(config=model.config)
    chunks = []
    with torch.no_grad():
        for part in ids.split([3, 20, 1, 1, 12, 1, 22], dim=1):
            chunks.append(model(part, past_key_values=cache).logits)
    close(torch.cat(chunks, 1), logits(model, ids))


@every_variant
def test_padding_on_either_side_changes_nothing(variant):
    model, ids = make_model(variant), make_ids(2, 60)
    alone = logits(model, ids)
    for padding in (5, 9, 16):
        noise = make_ids(1, padding, seed=1)
        rows = torch.cat((torch.cat((noise, ids[:1]), 1), torch.cat((ids[1:], noise), 1)))
        mask = torch.ones_like(rows)
        mask[0, :padding] = 0
        mask[1, 60:] = 0
        for use_cache in (False, True):
            with torch.no_grad():
                padded = model(rows, attention_mask=mask, use_cache=use_cache).logits
            close(padded[0, padding:], alone[0])
            close(padded[1, :60], alone[1])


@every_variant
def test_packed_equals_separate(variant):
    model = make_model(variant)
    documents = [make_ids(n, seed=n) for n in (20, 1, 3, 37)]
    separate = torch.cat([logits(model, document[None]) for document in documents], 1)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collator([{"input_ids": document.tolist()} for document in documents])
    labels = batch.pop("labels")
    assert labels.shape == (1, 61)
    ids = batch.pop("input_ids")
    close(logits(model, ids, position_ids=batch["position_ids"]), separate)
    counted = torch.arange(61)[None]  # the lengths alone say where sequences begin
    for positions in ({"position_ids": batch.pop("position_ids")}, {"position_ids": counted}, {}):
        close(logits(model, ids, **batch, **positions), separate)
    two_rows = torch.cat((documents[0], documents[2]))[None], make_ids(1, 23, seed=5)
    positions = torch.stack((torch.cat((torch.arange(20), torch.arange(3))), torch.arange(23)))
    both = logits(model, torch.cat(two_rows), position_ids=positions)
    close(both[0], torch.cat((separate[0, :20], separate[0, 21:24])))
    close(both[1:], logits(model, two_rows[1]))


@pytest.mark.parametrize("variant", ["separate", "hybrid"])
def test_compiled_code_sees_that_position_ids_restart(variant):
    torch._dynamo.reset()
    model, ids = make_model(variant), make_ids(1, 40)
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    separate = torch.cat((logits(model, ids[:, :15]), logits(model, ids[:, 15:])), 1)
    compiled = torch.compile(model, backend="eager")
    close(logits(compiled, ids, position_ids=positions), separate)
    close(logits(compiled, ids, position_ids=torch.arange(40)[None]), logits(model, ids))
    assert compiled(ids, position_ids=positions).past_key_values is None
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed sequences need fullgraph=False"):
        whole(ids, use_cache=False, position_ids=positions)


@every_variant
@pytest.mark.parametrize("T", [9, 120])
def test_no_logit_depends_on_a_later_token(variant, T):
    model, ids = make_model(variant), make_ids(1, T)
    before = logits(model, ids)
    for t in (1, T // 2, T - 1):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 99
        after = logits(model, changed)
        close(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def greedy(model, ids=None, **kwargs):
    settings = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0], "eos_token_id": None}
    return model.generate(ids, max_new_tokens=16, **settings, **kwargs)


@main_variants
def test_greedy_generation_with_cache_equals_without(variant):
    """20 random prompts, alone and as left-padded batches of five unequal lengths."""
    model = make_model(variant)
    lengths = [int(n) for n in torch.randint(3, 50, (20,), generator=torch.Generator().manual_seed(1))]
    prompts = [make_ids(1, n, seed=n) for n in lengths]
    answers = [greedy(model, prompt) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert torch.equal(greedy(model, prompt, use_cache=False), answer)
    for first in range(0, 20, 5):
        batch, width = prompts[first : first + 5], max(lengths[first : first + 5])
        ids, mask = torch.zeros(5, width, dtype=torch.long), torch.zeros(5, width, dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids[row, width - prompt.shape[1] :] = prompt
            mask[row, width - prompt.shape[1] :] = 1
        for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}):
            out = greedy(model, ids, attention_mask=mask, **kwargs)
            for row in range(5):
                assert torch.equal(out[row, width - lengths[first + row] :], answers[first + row][0])


@main_variants
@pytest.mark.parametrize("cached", [True, False])
def test_right_padded_rows_continue_after_their_last_token(variant, cached):
    model, ids = make_model(variant), make_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 13:20] = 0
    alone = logits(model, torch.cat((ids[1:, :13], ids[1:, 20:]), 1))[:, 13:]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if not cached:
        close(logits(model, ids, attention_mask=mask, position_ids=positions)[1:, 20:], alone)
        return
    cache, late = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 21), (21, 30)):
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache,
            )  # fmt: skip
            late.append(out.logits[1:])
    close(torch.cat(late[1:], 1), alone)


@main_variants
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
def test_generate_counts_on_after_the_last_real_token_of_right_padded_rows(variant, settings):
    model, ids = make_model(variant), make_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 13:] = mask[1, :6] = 0
    taken = []

    def note(module, args, kwargs):
        taken.append(kwargs["position_ids"][:, -1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    greedy(model, ids, attention_mask=mask, **settings)
    expected = torch.tensor([12, 13]).repeat_interleave(settings.get("num_beams", 1)) + torch.arange(16)[:, None]
    assert torch.equal(torch.stack(taken), expected)


@pytest.mark.parametrize("chunk", [None, 7])
def test_padding_gives_the_same_logits_however_the_prompt_is_chunked(chunk):
    model, ids = make_model(), make_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    expected = logits(model, ids, attention_mask=mask)
    cache, chunks = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start in range(0, 30, chunk or 30):
            stop = min(30, start + (chunk or 30))
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            chunks.append(out.logits)
    close(torch.cat(chunks, 1), expected)


@main_variants
def test_every_mode_of_generate(variant):
    model, ids = make_model(variant), make_ids(1, 30)
    expected = greedy(model, ids)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=4), expected)
    assert torch.equal(greedy(model, ids, assistant_model=make_model(variant, seed=3)), expected)
    assert torch.equal(greedy(model, ids, assistant_model=model), expected)
    assert torch.equal(greedy(model, None, inputs_embeds=model.get_input_embeddings()(ids)), expected[:, 30:])
    beams = greedy(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(greedy(model, ids, num_beams=3, num_return_sequences=2, use_cache=False), beams)
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0, use_cache=False), sampled)


@main_variants
def test_assistants_that_are_the_model_itself(variant):
    """Whole, where it also writes pad tokens, which the assistant takes for padding; and its first layers only."""
    model, ids = make_model(variant), make_ids(1, 45)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["pad_token_id"] = model.generate(ids, **settings)[0, 50].item()
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, assistant_model=model, **settings), expected)
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **settings), expected)
    assert model.config.num_hidden_layers == 2


@main_variants
def test_a_cache_can_be_continued_copied_and_reset(variant):
    model, ids = make_model(variant), make_ids(1, 30)
    expected = greedy(model, ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :17], past_key_values=cache)
    prefix = copy.deepcopy(cache)
    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)
    assert torch.equal(greedy(model, ids, past_key_values=prefix), expected)
    if variant == "hybrid":  # full layers before transformers 5.20 keep their length
        return
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(model, ids, past_key_values=cache), expected)
    assert torch.equal(greedy(model, ids, past_key_values=DynamicCache()), expected)  # plain layers are replaced


@pytest.mark.parametrize("shared_kv", [False, True])
def test_hidden_and_extra_outputs(shared_kv):
    model, ids = make_model(shared_kv=shared_kv), make_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        out = model(
            ids, attention_mask=mask, output_attentions=True, output_hidden_states=True,
            output_block_indices=True, output_gates=True,
        )  # fmt: skip
    assert [tuple(x.shape) for x in out.attentions] == [(2, 6, 40, 40)] * 2
    assert [tuple(x.shape) for x in out.block_indices] == [(2, 40, 2, 3)] * 2
    assert [tuple(x.shape) for x in out.gates] == [(2, 40, 6, 3)] * 2
    weights = out.attentions[0]
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(6, 40))
    assert (weights[1, :, :, :6] == 0).all()
    chosen = out.block_indices[0][1, -1, 0]
    tokens = weights[1, 0, -1].nonzero()[:, 0] - 6
    assert set((tokens // 8).tolist()) == set(chosen.tolist())
    assert out.block_indices[0][1, :6].eq(-1).all()
    plain = logits(model, ids, attention_mask=mask)
    close(out.logits[0], plain[0])
    assert model(ids).block_indices is None


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("name", ["output_block_indices", "output_gates"])
def test_task_heads_refuse_outputs_that_they_would_drop(task, name):
    head, ids = getattr(modeling_nsa, f"NSAFor{task}")(NSAConfig(**BASE)), make_ids(1, 20)
    with pytest.raises(ValueError, match=f"`{name}` must be False for NSAFor{task}, got True"):
        head(ids, **{name: True})
    head(ids, **{name: False})
    assert getattr(head.base_model(ids, **{name: True}), name.removeprefix("output_")) is not None
    assert "input_ids" in inspect.signature(head.forward).parameters


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_task_heads_answer_a_padded_row_as_they_do_alone_and_learn(task, side):
    torch.manual_seed(0)
    head = getattr(modeling_nsa, f"NSAFor{task}")(NSAConfig(**BASE, num_labels=3, pad_token_id=0)).eval()
    rows, lengths = make_ids(2, 60), (60, 41)
    mask = torch.zeros(2, 60, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    ids = rows * mask
    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 2])},
        "TokenClassification": {"labels": torch.ones_like(ids).masked_fill(mask == 0, -100)},
        "QuestionAnswering": {"start_positions": torch.tensor([25, 25]), "end_positions": torch.tensor([30, 30])},
    }[task]
    names = ("start_logits", "end_logits") if task == "QuestionAnswering" else ("logits",)
    together = head(ids, attention_mask=mask, **labels)
    for row in range(2):
        real = mask[row].bool()
        alone = head(ids[row : row + 1, real])
        for name in names:
            got, want = together[name][row], alone[name][0]
            close(got if task == "SequenceClassification" else got[real], want)
    together.loss.backward()
    assert all(parameter.grad is not None for parameter in head.base_model.layers[0].parameters())


def test_save_and_load_through_auto_classes(tmp_path):
    model, ids = make_model("qwen3-like"), make_ids(1, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, modeling_nsa.NSAForCausalLM)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert head(ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3)


@pytest.mark.parametrize("variant", ["separate", "shared", "qwen3-like"])
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    ids = make_ids(2, 40)
    grads = []
    for checkpointing in (False, True):
        model = make_model(variant).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.abs().max() > 0, name
        close(grads[1][name], grad)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 1, 20, 20), r"`attention_mask` must be 2-D, got \[2, 1, 20, 20\]"),
        (torch.ones(2, 19), r"`attention_mask` must have shape \[2, 0 past \+ 20 new\], got \[2, 19\]"),
        (torch.full((2, 20), 0.5), "`attention_mask` must hold only 0 and 1"),
    ],
)
def test_masks_that_are_not_padding_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        make_model()(make_ids(2, 20), attention_mask=mask)


def test_padding_between_real_tokens_needs_positions_that_count_them():
    mask = torch.tensor([[1] * 20, [1] * 8 + [0] + [1] * 11])
    with pytest.raises(ValueError, match="`position_ids` must number the real tokens consecutively where"):
        make_model()(make_ids(2, 20), attention_mask=mask, position_ids=torch.arange(20)[None])


@main_variants
def test_prompt_tuning_puts_virtual_tokens_before_the_padding(variant, request):
    peft = pytest.importorskip("peft")
    if CACHE_NAME == "cache" and Version(peft.__version__) <= Version("0.21.2"):
        # It looks for the cache under the old name and prompts anew at every step: a dense model continues wrongly
        # without a word, a sparse one has to refuse the mask.
        reason = "peft does not know the cache's new name"
        request.applymarker(pytest.mark.xfail(raises=ValueError, reason=reason))
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(make_model(variant), settings).eval()
    ids, mask = make_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    close(logits(model, ids, attention_mask=mask)[0, -14:], logits(model, ids[:1, 6:])[0, -14:])
    answers = greedy(model, input_ids=ids, attention_mask=mask)
    for row, start in ((0, 6), (1, 0)):
        alone = greedy(model, input_ids=ids[row : row + 1, start:])
        assert torch.equal(answers[row, start:], alone[0])


def test_a_cache_is_taken_by_either_name():
    model, ids = make_model(), make_ids(2, 20)
    expected = logits(model, ids)
    names, caches = ("past_key_values", "cache"), []
    for name in names:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :12], **{name: cache})
            output = model(ids[:, 12:], **{name: cache})
        close(output.logits, expected[:, 12:])
        assert output[CACHE_NAME] is cache
        caches.append(cache)
    with pytest.raises(ValueError, match="one argument under two names"):
        model(ids, **dict(zip(names, caches)))


def test_no_older_name_of_a_cache_is_used(caplog):
    """transformers says when its own names changed."""
    model, ids = make_model("hybrid"), make_ids(2, 20)
    logging.Logger.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level("WARNING", logger="transformers"):
        warnings.filterwarnings("error", message=".*past_key_values.*")
        for implementation in ("dynamic", "static"):
            model.generate(ids, max_new_tokens=3, cache_implementation=implementation)
        model.train().gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
    transformers_logging.disable_propagation()
    assert "past_key_values" not in caplog.text


def test_packed_sequences_refuse_a_mask_and_a_cache():
    model, ids = make_model(), make_ids(1, 20)
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="need `attention_mask=None`"):
        model(ids, cu_seq_lens_q=cu_seqlens, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="need `past_key_values=None`"):
        model(ids, cu_seq_lens_q=cu_seqlens, past_key_values=DynamicCache(config=model.config))
    restarting = torch.cat((torch.arange(8), torch.arange(12)))[None]
    with pytest.raises(ValueError, match=r"`position_ids` that restart\) need `attention_mask=None`"):
        model(ids, position_ids=restarting, attention_mask=torch.ones_like(ids))
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(ValueError, match=r"`position_ids` that restart\) need `past_key_values=None`"):
            model(ids, position_ids=restarting, past_key_values=cache)


@pytest.mark.parametrize(
    "cu_seqlens, given",
    [
        ([0, 8, 20], "got a list. Pass a tensor"),
        (torch.tensor([-1, 7, 19]), r"got \[-1, 7, 19\]"),
        (torch.tensor([0, 12, 8, 20]), r"got \[0, 12, 8, 20\]"),
        (torch.tensor([[0, 8, 20]]), r"got shape \[1, 3\]"),
        (torch.tensor([], dtype=torch.int32), r"got shape \[0\]"),
        (torch.tensor([0.0, 20.0]), r"got shape \[2\] of torch.float32"),
    ],
)
def test_lengths_of_packed_sequences_are_checked(cu_seqlens, given):
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must run from 0 to the number of tokens, 20.*" + given):
        make_model()(make_ids(1, 20), cu_seq_lens_q=cu_seqlens)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"input_ids": make_ids(20)}, r"`input_ids` must have shape \[batch, tokens\].*got \[20, 32\] after"),
        ({"inputs_embeds": torch.zeros(20, 32)}, r"or `inputs_embeds` \[batch, tokens, hidden_size\], got \[20, 32\]"),
        ({"position_ids": torch.arange(20)}, r"`position_ids` must be a tensor \[2, 20\] or \[1, 20\].*got \[20\]"),
        ({"position_ids": torch.arange(19)[None]}, r"got \[1, 19\]"),
        ({"position_ids": torch.arange(20).expand(3, 20)}, r"got \[3, 20\]"),
        ({"position_ids": [list(range(20))]}, "got list"),
    ],
)
def test_shapes_are_checked(inputs, message):
    if "position_ids" in inputs:
        inputs = {"input_ids": make_ids(2, 20), **inputs}
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs)


def test_the_triton_backend_is_not_replaced_silently(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run"):
        make_model(nsa_backend="triton")(make_ids(1, 20))


@pytest.mark.parametrize("variant", ["separate", "pool", "mlp", "mean", "qwen3-like"])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_get_one_type_under_autocast(monkeypatch, variant, packed):
    """RoPE and norms give fp32 there, and the kernels take none but equal types."""
    seen = []

    def record(*tensors, **where):
        seen.append({x.dtype for x in tensors[:7]})
        return nsa_attention(*tensors, **where)

    nsa_attention = attention_nsa.nsa_attention
    monkeypatch.setattr(attention_nsa, "nsa_attention", record)
    model, ids = make_model(variant), make_ids(1, 60)
    more = {"position_ids": torch.arange(60)[None] % 40} if packed else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(input_ids=ids, use_cache=False, labels=ids, **more).loss
        mixed.backward()
    assert seen == [{torch.bfloat16}] * 2
    full = model(input_ids=ids, use_cache=False, labels=ids, **more).loss
    assert mixed.item() == pytest.approx(full.item(), rel=0.02)


def test_exact_start_makes_every_new_parameter_learn_by_step_3():
    """Scales and the gates' last layer at step 1; gates' first layer, branches, φ's last layer at 2; the rest at 3."""
    torch.manual_seed(0)
    model = NSAForCausalLM(NSAConfig(**{**BASE, "gate_scale": True, "use_qk_norm": True})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    ids, first = make_ids(2, 60), {}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if name not in first and parameter.grad is not None and parameter.grad.abs().max() > 0:
                first[name] = step
        optimizer.step()
    assert first.keys() == dict(model.named_parameters()).keys()
    for name, step in first.items():
        if "gate_scale" in name or "gate.fc2" in name:
            assert step == 1, name
        elif "gate.fc1" in name or "_cmp" in name or "_win" in name or ".w2" in name or ".b2" in name:
            assert step <= 2, name


def test_an_accelerator_that_runs_the_reference_is_told_why_once(monkeypatch, caplog):
    from modeling_nsa import modeling_nsa as module

    module._warn_of_slow_path.cache_clear()
    monkeypatch.setattr(module, "triton_error", lambda device: "Triton is not installed.")
    monkeypatch.setattr(module.logger, "propagate", True)
    for device in ("cpu", "cuda", "cuda"):
        module._warn_of_slow_path(torch.device(device))
    (record,) = [record for record in caplog.records if "slow PyTorch reference" in record.message]
    assert "Triton is not installed." in record.message
    module._warn_of_slow_path.cache_clear()
