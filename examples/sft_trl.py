# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tune an NSA model on chats with TRL's SFTTrainer: packed, without padding, loss on the assistant's tokens.

    python examples/sft_trl.py --output_dir out --max_steps 2 --use_cpu
    python examples/sft_trl.py --model smollm2-nsa --train_file chats.jsonl --output_dir out --bf16

Takes every flag of TRL's SFTConfig. Without --model, SmolLM2-135M-Instruct is converted into OUTPUT_DIR/source.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

import modeling_nsa  # noqa: F401 - registers the model type
from nsa_conversion import convert, smollm2_gguf

TEMPLATE = Path(__file__).with_name("smollm2_training.jinja")
SUMS = [
    [
        {"role": "user", "content": f"What is {a} plus {b}?"},
        {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
    ]
    for a in range(12)
    for b in range(12)
]


@dataclass
class ScriptArguments:
    """What is trained on what."""

    model: str | None = field(default=None, metadata={"help": "NSA model: a directory or hub id."})
    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines with a 'messages' list each (default: sums of small numbers)."}
    )


@dataclass
class Arguments(SFTConfig):
    """TRL's SFTConfig with defaults for packed chats."""

    max_length: int | None = field(default=2048, metadata={"help": "Tokens per packed row."})
    packing: bool = field(default=True, metadata={"help": "Pack chats into rows of max_length tokens."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Loss on the assistant's tokens alone."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packed rows per device and step."})

    def __post_init__(self):
        if self.bf16 is None and self.use_cpu:
            self.bf16 = False  # TRL's default is bfloat16, which is slow on most CPUs
        super().__post_init__()


def main(argv: list[str] | None = None) -> SFTTrainer:
    """Train, save, and return the trainer."""
    script, args = HfArgumentParser((ScriptArguments, Arguments)).parse_args_into_dataclasses(argv)
    name = script.model
    if name is None:
        name = str(Path(args.output_dir) / "source")
        if not Path(name).is_dir():
            convert(smollm2_gguf(), name)
    if script.train_file is not None:
        chats = load_dataset("json", data_files=script.train_file, split="train")
    else:
        chats = Dataset.from_dict({"messages": SUMS})
    tokenizer = AutoTokenizer.from_pretrained(name)
    if args.assistant_only_loss and args.chat_template_path is None and "<|im_start|>" in tokenizer.chat_template:
        args.chat_template_path = str(TEMPLATE)  # the model's own does not say which tokens are the assistant's
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    trainer = SFTTrainer(model=model, args=args, train_dataset=chats, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
