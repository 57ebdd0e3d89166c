# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
r"""Train the same steps in one process and in several, and compare the loss curves.

    python examples/compare_loss_curves.py smollm2-nsa --config-file examples/accelerate/fsdp2.yaml --processes 2 \
        --output conversion/results/fsdp2_two_processes.json

With --resume-processes M the second half is run once more, in M processes, from the checkpoint in the middle. All
flags that this script does not know go to `nsa finetune`. Exits with 1 where a loss differs by more than --tolerance.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
import transformers

from nsa_conversion.data import builtin_text

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ["-m", "nsa_conversion"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="NSA model: a directory or hub id")
    parser.add_argument("--config-file", required=True, help="configuration of accelerate launch")
    parser.add_argument("--processes", type=int, default=2, help="processes to compare with one (default: 2)")
    parser.add_argument("--resume-processes", type=int, help="processes for the second half once more")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: 50)")
    parser.add_argument("--global-batch", type=int, default=4, help="rows per step over all processes (default: 4)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per row (default: 2048)")
    parser.add_argument("--train-file", help="text (default: the built-in one)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference allowed (default: 0.001)")
    parser.add_argument("--output", required=True, help="JSON file to write")
    return parser


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _train(output: Path, processes: int, config_file: str | None, args: argparse.Namespace, more: list[str]) -> list:
    """Run `nsa finetune` and return its losses by step."""
    command = [sys.executable]
    if config_file is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", config_file]
        command += ["--num_processes", str(processes), "--main_process_port", str(_free_port())]
    command += [*(PROGRAM if config_file is not None else ["-m", "nsa_conversion"]), "finetune", args.model]
    command += ["--train-file", args.train_file, "--output-dir", str(output), "--max-length", str(args.max_length)]
    command += ["--max-steps", str(args.steps), "--per-device-train-batch-size", str(args.global_batch // processes)]
    command += ["--save-strategy", "steps", "--save-steps", str(max(args.steps // 2, 1)), "--eval-slices", "0"]
    command += ["--disable-tqdm", *more]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    history = json.loads((output / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def _difference(left: list[float], right: list[float]) -> float:
    if len(left) != len(right):
        raise RuntimeError(f"one run logged {len(left)} steps, the other {len(right)}")
    return max(abs(a - b) for a, b in zip(left, right))


def main(argv: list[str] | None = None) -> int:
    """Run, compare and write the record; returns the exit code."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    for name in ("processes", "resume_processes"):
        number = getattr(args, name)
        if number is not None and (number < 1 or args.global_batch % number):
            parser.error(f"--{name.replace('_', '-')} must divide --global-batch {args.global_batch}, got {number}")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = args.train_file
        if text is None:
            args.train_file = str(folder / "text.txt")
            Path(args.train_file).write_text(builtin_text(), encoding="utf-8")
        one = _train(folder / "one", 1, None, args, more)
        several = _train(folder / "several", args.processes, args.config_file, args, more)
        differences = {f"{args.processes} processes": _difference(one, several)}
        curves = {"1 process": one, f"{args.processes} processes": several}
        if args.resume_processes is not None:
            checkpoint = f"checkpoint-{max(args.steps // 2, 1)}"
            shutil.copytree(folder / "several" / checkpoint, folder / "resumed" / checkpoint)
            resume = [*more, "--resume-from-checkpoint"]
            resumed = _train(folder / "resumed", args.resume_processes, args.config_file, args, resume)
            label = f"resumed at step {args.steps // 2} in {args.resume_processes} processes"
            curves[label] = resumed
            differences[label] = _difference(one, resumed)
    record = {
        "model": Path(args.model).name,
        "configuration": Path(args.config_file).name,
        "steps": args.steps,
        "global_batch": args.global_batch,
        "max_length": args.max_length,
        "text": "built-in" if text is None else Path(text).name,
        "more_flags": more,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and "--use-cpu" not in more else "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "largest_difference": differences,
        "losses": curves,
    }
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part")
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, output)
    for label, difference in differences.items():
        print(f"{label}: largest difference of the loss {difference:.2e} over {args.steps} steps")
    return int(max(differences.values()) > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
