# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding steps as a CUDA graph: when, and that `generate` answers as without; captures themselves need a GPU."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny_nsa import main_variants, make_ids, make_model
from transformers import CompileConfig, GenerationConfig, StaticCache

from modeling_nsa import graph_nsa
from modeling_nsa.graph_nsa import DecodeGraph

GREEDY = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [0], "eos_token_id": None, "max_new_tokens": 16}
STATIC = {"cache_implementation": "static"}
SMALL = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}  # what kernels take


class Calls:
    """Counts the steps that run in Python, and the captures among them."""

    def __init__(self, monkeypatch, compiled=None):
        self.steps, self.captures = 0, 0
        run, capture = compiled or graph_nsa._compiled(), graph_nsa._capture

        def counted_run(model, inputs):
            self.steps += 1
            return run(model, inputs)

        def counted_capture(*args):
            self.captures += 1
            return capture(*args)

        monkeypatch.setattr(graph_nsa, "_compiled", lambda: counted_run)
        monkeypatch.setattr(graph_nsa, "_capture", counted_capture)


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU: a capture that notes the step, and a replay that computes it from the graph's own inputs
# ---------------------------------------------------------------------------------------------------------------------


class Recorded:
    def __init__(self, function, output):
        self.function, self.output = function, output

    def replay(self):
        self.output.logits.copy_(self.function().logits)


@pytest.fixture
def calls(monkeypatch):
    """Steps are not compiled, and what is replayed counts as one too."""
    shape = {}

    def run_aside(function, device):
        output = function()
        shape["like"] = output
        return output

    def capture(function, device):
        like = shape.pop("like")
        output = type(like)(logits=torch.full_like(like.logits, torch.nan), past_key_values=like.past_key_values)
        return Recorded(function, output), output

    monkeypatch.setattr(graph_nsa, "_run_aside", run_aside)
    monkeypatch.setattr(graph_nsa, "_capture", capture)
    return Calls(monkeypatch, graph_nsa._forward)


def use_graphs(model, monkeypatch):
    """Let `generate` on a CPU compile, by `DecodeGraph`; what it does otherwise runs uncompiled, and is counted."""
    others = []

    def otherwise():
        others.append(1)
        return model.__call__

    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *args: True)
    monkeypatch.setattr(model, "get_compiled_call", lambda config: DecodeGraph(model, otherwise))
    return others


def ragged(rows=3, tokens=20):
    ids = make_ids(rows, tokens)
    mask = torch.ones_like(ids)
    mask[0, 13:] = mask[-1, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


def go_on(model, inputs):
    """Continue a static cache in a second call, which must answer as one call does; a weak reference to the cache."""
    cache = StaticCache(config=model.config, max_cache_len=80)
    first = model.generate(**inputs, past_key_values=cache, **GREEDY)
    longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 16), value=1)
    again = model.generate(first, attention_mask=longer, past_key_values=cache, **GREEDY)
    assert torch.equal(again, model.generate(**inputs, **{**GREEDY, "max_new_tokens": 32}))
    return weakref.ref(cache)


@main_variants
def test_a_replay_computes_what_the_model_does(monkeypatch, calls, variant):
    model, inputs = make_model(variant), ragged()
    expected = model.generate(**inputs, **GREEDY, **STATIC)
    others = use_graphs(model, monkeypatch)
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC), expected)
    assert (calls.captures, calls.steps, others) == (1, 15, [])
    go_on(model, inputs)
    assert calls.captures == 3


def test_logits_that_were_returned_stay(monkeypatch, calls):
    model, ids = make_model(), make_ids(1, 20)
    cache, step = StaticCache(config=model.config, max_cache_len=40), DecodeGraph(model, otherwise=None)
    with torch.no_grad():
        expected = model(ids).logits[:, 10:]
        model(ids[:, :10], past_key_values=cache)
        steps = [step(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=2e-5)
    assert calls.captures == 1


def test_another_signature_starts_anew(monkeypatch, calls):
    model, ids = make_model(), make_ids(2, 20)
    cache, step = StaticCache(config=model.config, max_cache_len=60), DecodeGraph(model, otherwise=None)

    def run(times, masked=False, **inputs):
        before = calls.captures
        for _ in range(times):
            if masked:
                real = torch.arange(60).expand(2, -1) <= cache.get_seq_length()
                inputs["attention_mask"] = {"native_sparse_attention": real}
            step(input_ids=ids[:, :1], past_key_values=cache, **inputs)
        return calls.captures - before

    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert run(2) == 0
        assert run(1) == 1
        assert run(2) == 0
        assert run(2, masked=True) == 0
        assert run(2, masked=True) == 1
        assert run(3, masked=True, logits_to_keep=1) == 1
        assert run(3, position_ids=torch.full((2, 1), 40)) == 1
        assert run(1, position_ids=torch.full((2, 1), 41)) == 0
        assert run(3, position_ids=torch.full((1, 1), 42)) == 1
        cache.layers[1].k_win = cache.layers[1].k_win.clone()
        assert run(2, position_ids=torch.full((1, 1), 42)) == 0


def test_steps_are_compiled_once(monkeypatch, calls):
    torch._dynamo.reset()
    model, inputs, graphs = make_model(**SMALL), ragged(), torch._dynamo.utils.counters["stats"]
    expected = model.generate(**inputs, **GREEDY)
    use_graphs(model, monkeypatch)
    compiled = torch.compile(graph_nsa._forward, backend="eager", fullgraph=True)
    monkeypatch.setattr(graph_nsa, "_compiled", lambda: compiled)
    graphs.clear()
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC), expected)
        assert graphs["unique_graphs"] == 1


def test_beams_are_never_captured(monkeypatch, calls):
    model, inputs = make_model(), ragged()
    expected = model.generate(**inputs, **GREEDY, num_beams=3)
    others = use_graphs(model, monkeypatch)
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC, num_beams=3), expected)
    assert calls.captures == 0
    assert not others


@pytest.mark.parametrize(
    "variant, settings",
    [
        ("sliding", {}),
        ("gemma3 sliding", {}),
        ("separate", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("separate", {"prefill_chunk_size": 7}),
    ],
)
def test_other_steps_go_another_way(monkeypatch, calls, variant, settings):
    """Sliding layers count in Python, and what else a step returns would be overwritten; chunks are no steps."""
    model, inputs = make_model(variant), {"input_ids": make_ids(2, 20)}
    expected = model.generate(**inputs, **GREEDY, **STATIC, **settings)
    others = use_graphs(model, monkeypatch)
    answer = model.generate(**inputs, **GREEDY, **STATIC, **settings)
    if "return_dict_in_generate" in settings:
        assert torch.equal(answer.hidden_states[-1][-1], expected.hidden_states[-1][-1])
        expected, answer = expected.sequences, answer.sequences
    assert torch.equal(answer, expected)
    assert others
    assert calls.captures == ("prefill_chunk_size" in settings)


def test_a_step_that_cannot_be_captured_is_computed_once(monkeypatch, calls):
    model, inputs = make_model(), ragged()
    expected = model.generate(**inputs, **GREEDY, **STATIC)
    others = use_graphs(model, monkeypatch)

    def capture(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph_nsa, "_capture", capture)
    warned = []
    monkeypatch.setattr(graph_nsa.logger, "warning_once", warned.append)
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC), expected)
    assert (calls.steps, len(others), len(warned)) == (2, 13, 1)
    assert "not permitted when stream is capturing" in warned[0]


def test_only_models_that_can_be_captured_are(monkeypatch):
    """On a CPU every call is transformers' own; as if this were a GPU, those that need more than one graph are."""
    model = make_model()
    assert not isinstance(model.get_compiled_call(None), DecodeGraph)
    monkeypatch.setattr("modeling_nsa.modeling_nsa.captures", lambda model: True)
    assert isinstance(model.get_compiled_call(None), DecodeGraph)
    own = CompileConfig(backend="eager", mode=None)
    assert not isinstance(model.get_compiled_call(own), DecodeGraph)
    model.generation_config = GenerationConfig(compile_config=own)
    assert not isinstance(model.get_compiled_call(None), DecodeGraph)


def test_nothing_of_a_graph_stays(monkeypatch, calls):
    model, inputs = make_model(), ragged()
    others = use_graphs(model, monkeypatch)
    before = set(vars(model))
    cache = StaticCache(config=model.config, max_cache_len=40)
    expected = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert calls.captures == 1
    assert not others
    assert set(vars(model)) <= before | {"_previous_max_cache_length"}
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None
    monkeypatch.undo()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(**inputs, **GREEDY, **STATIC), expected)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    torch._dynamo.reset()
    return Calls(monkeypatch)


def on_gpu(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["separate", "shared", "hybrid", "gemma3-like", "mlp"])
def test_graphs_answer_as_a_dynamic_cache_does(counted, variant):
    """Of several batch sizes and lengths, padded on the left and on the right; Python runs three steps of each."""
    model = make_model(variant, **SMALL).cuda()
    for made, (rows, tokens) in enumerate([(3, 20), (3, 33), (1, 20), (2, 70)], start=1):
        inputs = on_gpu(ragged(rows, tokens))
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC), expected)
        assert (counted.captures, counted.steps) == (made, 3 * made)


@pytest.mark.gpu
def test_nothing_is_compiled_after_the_first_step(counted):
    model, inputs, graphs = make_model(**SMALL).cuda(), on_gpu(ragged()), []

    def note(input_ids, scores, **kwargs):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model.generate(**inputs, **GREEDY, **STATIC, stopping_criteria=[note])
    assert len(graphs) == 16
    assert graphs[1] > graphs[0]
    assert len(set(graphs[1:])) == 1
    model.generate(**inputs, **GREEDY, **STATIC)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[-1]


@pytest.mark.gpu
def test_samples_scores_and_beams_on_a_gpu(counted):
    model, inputs = make_model(**SMALL).cuda(), on_gpu(ragged())
    sampling = {"max_new_tokens": 16, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    sampling |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    answers = []
    for settings in ({"disable_compile": True}, {}):
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, **sampling, **STATIC, **settings))
    assert counted.captures == 1
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(answers[0][name]), torch.stack(answers[1][name]), rtol=1e-4, atol=1e-4)
    expected = model.generate(**inputs, **GREEDY, num_beams=3)
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC, num_beams=3), expected)
    assert counted.captures == 1


@pytest.mark.gpu
def test_changes_of_the_model_between_calls_are_seen(counted):
    model, other, inputs = make_model(**SMALL).cuda(), make_model(seed=1, **SMALL), on_gpu(ragged())

    def check():
        before = counted.captures
        answer = model.generate(**inputs, **GREEDY, **STATIC)
        assert torch.equal(answer, model.generate(**inputs, **GREEDY))
        assert counted.captures == before + 1
        return answer

    first = check()
    model.to(torch.bfloat16)
    model.generate(**inputs, **GREEDY, **STATIC)
    model.to(torch.float32).load_state_dict(make_model(**SMALL).state_dict())
    assert torch.equal(check(), first)
    model.load_state_dict({name: x.cuda() for name, x in other.state_dict().items()}, assign=True)
    assert not torch.equal(check(), first)
    model.fuse_projections()
    check()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    check()
    model.set_attn_implementation("eager")
    model.config.nsa_backend = "reference"
    check()


@pytest.mark.gpu
def test_a_cache_goes_on_and_is_freed(counted):
    model, inputs = make_model("hybrid", **SMALL).cuda(), on_gpu(ragged())
    reference = go_on(model, inputs)
    assert counted.captures == 2
    gc.collect()
    assert reference() is None


@pytest.mark.gpu
def test_memory_does_not_grow_with_calls(counted):
    model, inputs, reserved = make_model(**SMALL).cuda(), on_gpu(ragged()), []
    for _ in range(12):
        model.generate(**inputs, **GREEDY, **STATIC)
        reserved.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert reserved[-1][0] <= reserved[2][0], reserved
    assert reserved[-1][1] <= reserved[2][1] + 2**21, reserved


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_generation_as_it_was(monkeypatch, counted):
    model, inputs, warned = make_model(**SMALL).cuda(), on_gpu(ragged()), []
    monkeypatch.setattr(graph_nsa.logger, "warning_once", warned.append)
    run = graph_nsa._compiled()

    def waits(model, inputs):
        output = run(model, inputs)
        output.logits.sum().item()
        return output

    monkeypatch.setattr(graph_nsa, "_compiled", lambda: waits)
    expected = model.generate(**inputs, **GREEDY)
    stream = torch.cuda.current_stream()
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC), expected)
    assert len(warned) == 1
    assert torch.cuda.current_stream() == stream
    sampling = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    answers = []
    for settings in ({"disable_compile": True}, {}):
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, **sampling, **STATIC, **settings))
    assert torch.equal(*answers)


@pytest.mark.gpu
def test_models_with_hooks_or_in_training_are_not_captured():
    model, ids = make_model(**SMALL).cuda(), make_ids(1, 8).cuda()
    with torch.no_grad():
        assert graph_nsa.captures(model)
        model(ids, output_hidden_states=True)  # leaves hooks of transformers' own
        assert graph_nsa.captures(model)
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
        assert not graph_nsa.captures(model)
        hook.remove()
        assert graph_nsa.captures(model)
        assert not graph_nsa.captures(model.train())
    assert not graph_nsa.captures(model.eval())
    with torch.no_grad():
        model.lm_head.cpu()
        assert not graph_nsa.captures(model)
