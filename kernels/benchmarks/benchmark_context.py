# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Time training steps of a 1B model whose sequences are spread over GPUs, against one GPU.

    torchrun --nproc-per-node 2 kernels/benchmarks/benchmark_context.py --output context.csv

The model and the step are those of benchmark_training.py; the gradients of the GPUs are averaged behind the backward
pass, without overlap. Rows give the median step in milliseconds, tokens per second of all GPUs together and the largest
peak memory of a GPU. efficiency is tokens per second per GPU over those of one GPU with the same sequence, and
weak_efficiency over those of one GPU with the tokens that a GPU now has. When several GPUs run out of memory the run
ends; what was measured before is in the file.

First, one sequence is computed by one GPU and by all, from the same weights: in fp32, in bf16, and in bf16 with the
blocks that one GPU chose. The loss must agree within 1e-3, the gradient of all parameters together in rounding and in
what swapped blocks change; flipped is the share of choices (of a query and key/value head, over all layers) in which
any block differs.
"""

import gc
import itertools
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from benchmark_training import (
    MODEL,
    TEXTS,
    build,
    chunked_loss,
    make_text,
    measure_steps,
    summed_loss,
)
from common import Results, machine, make_parser, plot_steps, require_cuda

from modeling_nsa import shard_inputs
from nsa_kernels import reference

# data type and whether the choice of blocks is fixed: relative error of the gradient that rounding explains
CHECKS = {("float32", False): 1e-3, ("bfloat16", False): 0.03, ("bfloat16", True): 0.03}
LOSS_TOLERANCE = 1e-3


def forward(model, ids, group=None, heads=None, **kwargs):
    """Loss of this process, and the model's outputs; the mean over the group is the loss of the sequence."""
    if group is None:
        outputs = model.model(input_ids=ids, use_cache=False, **kwargs)
        return chunked_loss(outputs.last_hidden_state, model.lm_head.weight, ids), outputs
    inputs = shard_inputs({"input_ids": ids, "labels": ids}, group, model.config, heads)
    labels, count = inputs.pop("shift_labels"), inputs.pop("num_items_in_batch")
    del inputs["labels"]
    outputs = model.model(**inputs, use_cache=False, **kwargs)
    return summed_loss(outputs.last_hidden_state[0], model.lm_head.weight, labels[0]) / count, outputs


def backward(model, loss, group=None):
    """Gradients of the sequence; returns its loss."""
    loss.backward()
    loss = loss.detach()
    if group is not None:
        for x in (loss, *(parameter.grad for parameter in model.parameters())):
            dist.all_reduce(x, group=group)
            x /= dist.get_world_size(group)
    return loss.item()


def step(model, optimizer, ids, group=None, heads=None):
    """One training step."""
    loss = backward(model, forward(model, ids, group, heads)[0], group)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# One GPU and several compute the same
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def fixed_choice(model, choices):
    """Let every layer read the blocks `choices[layer]`, `[1, T, H, n]`, of this process's tokens."""
    at = {}

    def start(layer, *_):
        at.update(layer=layer, token=0)

    def chosen(q, *_, **__):
        first, at["token"] = at["token"], at["token"] + q.shape[1]
        return choices[at["layer"]][:, first : at["token"]].clone()

    places = [(reference, "select_blocks")]
    if choices[0].device.type == "cuda":
        from nsa_kernels import attention

        places.append((attention, "chosen_blocks"))
    originals = [getattr(*place) for place in places]
    # the recomputation of a checkpointed layer passes here too
    hooks = [
        layer.self_attn.register_forward_pre_hook(partial(start, number))
        for number, layer in enumerate(model.model.layers)
    ]
    for place in places:
        setattr(*place, chosen)
    try:
        yield
    finally:
        for place, original in zip(places, originals):
            setattr(*place, original)
        for hook in hooks:
            hook.remove()


def compare(sizes, dtype, fixed, ids, group, device="cuda"):
    """Compute one sequence on one GPU and on all.

    Returns:
        loss_difference, gradient_error (relative, all parameters together), worst_error and worst_parameter, flipped.
    """
    model = build("nsa", {**sizes, "gate_scale": False}, device=device, dtype=dtype)  # all branches open
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".w2", ".fc2.weight")):  # they start at 0: nothing before them would have a gradient
                parameter.normal_(0, 0.02)
    loss, outputs = forward(model, ids, output_block_indices=True)
    choices = [x.contiguous() for x in outputs.block_indices]
    del outputs
    single = backward(model, loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for x in choices:  # kernels may add in another order on each GPU
        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    shard = shard_inputs({"input_ids": ids}, group, model.config)["context_shard"]
    padding = 2 * shard.size * shard.chunk_length - ids.shape[1]
    own = [shard.take(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding), value=-1)) for x in choices]
    real = shard.take(torch.arange(ids.shape[1] + padding, device=ids.device)[None])[0] < ids.shape[1]

    with fixed_choice(model, own) if fixed else nullcontext():
        loss, outputs = forward(model, ids, group, output_block_indices=True)
        several = backward(model, loss, group)
    flips = [(a != b).any(-1)[:, real].float().sum() for a, b in zip(own, outputs.block_indices)]
    flipped = torch.stack(flips).sum()
    dist.all_reduce(flipped, group=group)
    errors, norms = {}, {}
    for name, parameter in model.named_parameters():
        norms[name] = gradients[name].double().norm().item()
        errors[name] = (parameter.grad.double() - gradients[name].double()).norm().item()
    worst = max(errors, key=lambda name: errors[name] / max(norms[name], 1e-30))
    whole = sum(x**2 for x in norms.values()) ** 0.5
    return {
        "loss": single,
        "loss_difference": several - single,
        "gradient_error": sum(x**2 for x in errors.values()) ** 0.5 / whole,
        "worst_error": errors[worst] / max(norms[worst], 1e-30),
        "worst_parameter": worst,
        "flipped": flipped.item() / sum(x[..., 0].numel() for x in choices),
    }


def tolerance(dtype, fixed, flipped):
    """Largest relative error of the gradient: rounding, and a swapped block changes what its query gives entirely."""
    return CHECKS[dtype, fixed] + flipped**0.5


def check(sizes, tokens, group, results):
    """Exit where one GPU and several disagree: what is wrong is not timed."""
    for dtype, fixed in CHECKS:
        ids = make_text("runs", tokens, sizes["vocab_size"])
        row = compare(sizes, getattr(torch, dtype), fixed, ids, group)
        gc.collect()
        torch.cuda.empty_cache()
        about = {"mode": "check", "dtype": dtype, "choice": "fixed" if fixed else "own", "tokens": tokens}
        row = about | {"gpus": dist.get_world_size(group)} | row
        if results is not None:
            results.add(**row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        off = abs(row["loss_difference"]) > LOSS_TOLERANCE or (fixed and row["flipped"])
        if off or not row["gradient_error"] <= tolerance(dtype, fixed, row["flipped"]):
            raise SystemExit(f"{dtype}: one GPU and several disagree ({row}): not timed.")


# ---------------------------------------------------------------------------------------------------------------------


def efficiencies(rows, row):
    """Tokens per second per GPU against one GPU: with the same sequence, and with as many tokens per GPU."""
    alone = {x["tokens"]: x["tokens_per_s"] for x in rows if x.get("gpus") == 1 and "tokens_per_s" in x}
    each = row["tokens_per_s"] / row["gpus"]
    tokens = {"efficiency": row["tokens"], "weak_efficiency": row["tokens"] // row["gpus"]}
    return {name: round(each / alone[count], 4) for name, count in tokens.items() if count in alone}


def plot(rows, path):
    """Tokens per second and peak memory by length and number of GPUs."""
    title = f"Training steps of a 1B model over GPUs, {rows[0]['gpu']}"
    rows = [row for row in rows if row["mode"] == "step"]
    series = {f"{n} GPU{'s' if n > 1 else ''}": {"gpus": n} for n in sorted({row["gpus"] for row in rows})}
    return plot_steps(rows, path, title, series, "sequence", "peak memory of a GPU, GiB")


def parse(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[65536, 131072, 262144], help="tokens in a sequence")
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of GPUs to compare (default: 1 and all)")
    parser.add_argument("--text", choices=TEXTS, default="runs", help="see benchmark_training.py")
    parser.add_argument("--heads", type=int, help="key/value heads that are gathered at a time (default: all)")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="layers of the model")
    parser.add_argument("--steps", type=int, default=3, help="steps to time after two that are not counted")
    parser.add_argument("--check-tokens", type=int, default=32768, help="tokens of the comparison; 0 leaves it out")
    return parser.parse_args(arguments)


def time_steps(args, sizes, groups, results):
    """Rows of all lengths and numbers of GPUs; the GPUs that are not needed wait."""
    rank = dist.get_rank()
    model = build("nsa", sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for tokens, (gpus, group) in itertools.product(sorted(args.lengths), groups.items()):
        row = {"mode": "step", "dtype": "bfloat16", "text": args.text, "tokens": tokens, "gpus": gpus}
        row["heads_at_once"] = args.heads
        if rank < gpus:
            ids = make_text(args.text, tokens, sizes["vocab_size"])
            shared = group if gpus > 1 else None
            try:
                row |= measure_steps(partial(step, model, optimizer, ids, shared, args.heads), tokens, args.steps)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
                optimizer.zero_grad(set_to_none=True)
            if shared is not None and "note" not in row:
                peak = torch.tensor(row["peak_gib"], device="cuda")
                dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
                row["peak_gib"] = round(peak.item(), 2)
        if results is not None:
            if "tokens_per_s" in row:
                row |= efficiencies(results.rows, row)
            results.add(**row)
            shown = ("median_ms", "tokens_per_s", "peak_gib", "efficiency", "weak_efficiency", "note")
            print(f"{gpus} GPUs, {tokens:,}: ", *(f"{key} {row[key]}" for key in shown if key in row), flush=True)
        if gpus > 1 and "note" in row:
            raise SystemExit(f"{gpus} GPUs ran out of memory with {tokens:,} tokens; the others wait for this one.")
        gc.collect()
        torch.cuda.empty_cache()
        dist.barrier()


def main():
    args = parse()
    require_cuda()
    if "RANK" not in os.environ:
        raise SystemExit(f"Start this benchmark with `torchrun --nproc-per-node N {__file__} …`, one process per GPU.")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", timeout=timedelta(minutes=30), device_id=device)
    world = dist.get_world_size()
    counts = sorted(set(args.gpus or [1, world]))
    if not all(1 <= count <= world for count in counts):
        raise SystemExit(f"--gpus must be between 1 and the {world} processes of torchrun, got {counts}")
    groups = {count: dist.new_group(list(range(count))) for count in counts}
    sizes = {**MODEL, "num_hidden_layers": args.layers, "max_position_embeddings": max(131072, *args.lengths)}
    results = None
    if dist.get_rank() == 0:
        about = {"layers": args.layers, "optimizer": "fused AdamW, bf16", "checkpointing": "every layer"}
        results = Results(args.output, about | machine(args.commit))
    if args.check_tokens:
        check(sizes, args.check_tokens, dist.group.WORLD, results)
    time_steps(args, sizes, groups, results)
    if results is not None:
        plot(results.rows, args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
