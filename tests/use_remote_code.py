# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Uses saved models as somebody who has not installed this project: `python use_remote_code.py FOLDER`.

`test_hub_nsa.py` fills the folder and runs this in an interpreter that sees only installed libraries; it also runs by
hand in any environment with torch and transformers. Parts that need a hub with the models (`HF_ENDPOINT`), a GPU or
Triton's interpreter, accelerate, or peft are left out where these are missing.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import transformers


def load(auto_class, directory):
    model = auto_class.from_pretrained(directory, trust_remote_code=True)
    for part in (type(model), type(model.config), *map(type, model.modules())):
        assert part.__module__.split(".")[0] in ("transformers_modules", "transformers", "torch", "peft"), part
    return model.eval()


def same(model, expected):
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"])


def generates(model, expected):
    output = model.generate(expected["prompt"], max_new_tokens=12, do_sample=False)
    assert output.tolist() == expected["generated"].tolist()


def main(folder):
    for name in ("nsa_kernels", "modeling_nsa", "nsa_conversion"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed here"
    causal = torch.load(folder / "causal.pt")
    done = ["logits", "generate", "heads", "save again"]
    model = load(transformers.AutoModelForCausalLM, folder / "causal")
    same(model, causal)
    generates(model, causal)
    gemma3, expected = load(transformers.AutoModelForCausalLM, folder / "gemma3"), torch.load(folder / "gemma3.pt")
    same(gemma3, expected)
    generates(gemma3, expected)
    with torch.no_grad():
        hidden = load(transformers.AutoModel, folder / "causal")(causal["ids"]).last_hidden_state
    assert torch.equal(model.lm_head(hidden), causal["logits"])
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        load(getattr(transformers, f"AutoModelFor{task}"), folder / "causal")
    same(
        load(transformers.AutoModelForSequenceClassification, folder / "classifier"),
        torch.load(folder / "classifier.pt"),
    )

    model.save_pretrained(folder / "again")
    names = {path.name for path in (folder / "causal").glob("*.py")}
    assert names == {path.name for path in (folder / "again").glob("*.py")}
    for name in names:
        assert (folder / "again" / name).read_bytes() == (folder / "causal" / name).read_bytes(), name
    again = load(transformers.AutoModelForCausalLM, folder / "again")
    same(again, causal)
    generates(again, causal)

    if "HF_ENDPOINT" in os.environ:
        model = load(transformers.AutoModelForCausalLM, "me/causal")
        same(model, causal)
        model.save_pretrained(folder / "from_hub")
        same(load(transformers.AutoModelForCausalLM, folder / "from_hub"), causal)
        done.append("hub")

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        again.to("cuda" if torch.cuda.is_available() else "cpu")
        again.config.nsa_backend = "triton"
        ids = causal["ids"][:1, :40].to(again.device)
        with torch.no_grad():
            logits = again(ids).logits.cpu()
        torch.testing.assert_close(logits, causal["logits"][:1, :40], rtol=1e-3, atol=1e-3)
        assert any(name.endswith("nsa_kernels_triton_common") for name in sys.modules)
        again.to("cpu")
        done.append("kernels")

    if importlib.util.find_spec("accelerate"):
        rows = [{"input_ids": ids, "labels": ids} for ids in causal["ids"]]
        arguments = transformers.TrainingArguments(
            folder / "trained",
            max_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=2,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        assert trainer.train().global_step == 1
        trained = load(transformers.AutoModelForCausalLM, folder / "trained" / "checkpoint-1")
        with torch.no_grad():
            assert torch.equal(trained(causal["ids"]).logits, model.eval()(causal["ids"]).logits)
        assert not torch.equal(trained.lm_head.weight, again.lm_head.weight)
        trainer.args.max_steps = 2
        trainer.train(resume_from_checkpoint=str(folder / "trained" / "checkpoint-1"))
        done.append("train")
    if importlib.util.find_spec("peft"):
        import peft

        adapted = load(transformers.AutoModelForCausalLM, folder / "adapter")
        same(adapted, torch.load(folder / "adapter.pt"))
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", trust_remote_code=True).eval()
        same(adapted, torch.load(folder / "adapter.pt"))
        adapted.merge_and_unload().save_pretrained(folder / "merged")
        done.append("adapter")
    for name in ("nsa_kernels", "modeling_nsa", "nsa_conversion"):
        assert name not in sys.modules
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"done": done, **versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
