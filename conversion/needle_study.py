# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Which needles a sparse model loses, prompt by prompt, and whether the blocks that it chooses are to blame.

`python conversion/needle_study.py OUTPUT.json MODEL` asks the questions of `needle_choice`, one prompt at a time: the
margin is by how much the right digit is likelier than the likeliest wrong one, in nats, at its worst. Prompts whose
margin is not above 0 are lost. They, and some that are found, are asked again with the blocks of most dense attention
mass in place of the chosen ones. For every layer and key/value head it is noted how much attention the number's blocks
would get from dense attention when the answer is written, the most over the heads of the group, and how much of it lies
in chosen blocks. OUTPUT.png shows what is left out as heat maps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from nsa_conversion import NSAError, load_model
from nsa_conversion.data import builtin_text
from nsa_conversion.diagnosis import (
    behind_layers,
    block_mass,
    dense_choice,
    forced_blocks,
    is_sparse,
    query_key_value,
)
from nsa_conversion.evaluate import default_device, environment_of
from nsa_conversion.plots import plot_heatmaps, require_matplotlib
from nsa_conversion.tasks import Material, Trial, choice_margins, make_trials

__all__ = ["main", "study"]

TASK = "needle_choice"


def margin(model, tokenizer, trial: Trial) -> float:
    """The least margin of a prompt, in nats."""
    (contests,) = choice_margins(model, tokenizer, [trial])
    return min(min(contest) for contest in contests)


def _number(trial: Trial) -> int:
    """Where the number stands in the prompt."""
    prompt, answer = trial.prompt, list(trial.continuation)
    return next(place for place in range(len(prompt)) if prompt[place : place + len(answer)] == answer)


def attention_to_number(model, tokenizer, trial: Trial) -> list[dict[str, Any]]:
    """For every layer and key/value head, over the tokens that are compared: dense mass of the number's blocks.

    Returns:
        One entry per layer and head: mass, summed over blocks and queries, and chosen, the part of it in chosen blocks.
    """
    first, place = len(trial.prompt) - 1, _number(trial)
    queries = sorted({first + i for contest in trial.contests for i, _, _ in contest})
    rows = []

    def note(layer, attention, kwargs, outputs):
        size, chosen = attention.config.select_block_size, outputs[2][0]  # [T, H, n]
        held = sorted({(place + i) // size for i in range(len(trial.continuation))})
        q, k, _ = query_key_value(attention, kwargs["hidden_states"], kwargs["position_embeddings"])
        sums = np.zeros((2, k.shape[2]))
        for query in queries:
            mass = block_mass(q[0], k[0], query, query + 1, size, attention.scaling)[0]  # [HQ, S]
            mass = mass.unflatten(0, (k.shape[2], -1)).amax(1)[:, held]  # [H, blocks of the number]
            taken = (chosen[query][:, None] == torch.tensor(held, device=chosen.device)[:, None]).any(-1)
            sums += torch.stack((mass.sum(-1), (mass * taken).sum(-1))).double().cpu().numpy()
        rows.extend(
            {"layer": layer, "head": head, "mass": mass, "chosen": chosen_mass}
            for head, (mass, chosen_mass) in enumerate(sums.T.tolist())
        )

    with behind_layers(model, note):
        choice_margins(model, tokenizer, [trial])
    return rows


@torch.no_grad()
def study(
    model, tokenizer, *, dense=None, length: int, depths: int, trials: int, found: int, progress: bool = True
) -> list[dict[str, Any]]:
    """Ask every prompt, and those that are lost and `found` others once more.

    Args:
        model: with sparse layers.
        dense: another model with this tokenizer to ask too.
        length: tokens of prompt and answer.
        depths: of the number, evenly from 0 to 1.
        trials: prompts per depth, those of `nsa eval`.
        found: prompts that are not lost to look at as well, from between the ends.

    Returns:
        One entry per prompt: depth, trial, place of the number in tokens, and margin; `dense_margin` with `dense`; for
        those looked at, `oracle_margin` and what `attention_to_number` returns as `layers`.

    Raises:
        NSAError: the model has no sparse layers, or a number is out of range.
    """
    if not is_sparse(model):
        raise NSAError(f"a study of needles needs sparse layers, and this {type(model).__name__} has none")
    if depths < 1 or found < 0:
        raise NSAError(f"depths must be at least 1 and found not negative, got {depths} and {found}")
    material = Material(builtin_text())
    made = [
        (depth, number, trial)
        for depth in np.linspace(0, 1, depths).tolist()
        for number, trial in enumerate(make_trials(TASK, tokenizer, material, length, depth=depth, trials=trials))
    ]
    rows = []
    for depth, number, trial in tqdm(made, desc="own blocks", unit=" prompts", disable=not progress):
        row = {"depth": depth, "trial": number, "place": _number(trial), "margin": margin(model, tokenizer, trial)}
        rows.append(row | ({} if dense is None else {"dense_margin": margin(dense, tokenizer, trial)}))
    lost = [place for place, row in enumerate(rows) if row["margin"] <= 0]
    others = [place for place, row in enumerate(rows) if row["margin"] > 0 and 0 < row["depth"] < 1]
    others = np.random.default_rng(0).permutation(others)[:found].tolist()
    for place in tqdm([*lost, *others], desc="dense choice", unit=" prompts", disable=not progress):
        trial = made[place][2]
        rows[place]["layers"] = attention_to_number(model, tokenizer, trial)
        with forced_blocks(model, dense_choice):
            rows[place]["oracle_margin"] = margin(model, tokenizer, trial)
    return rows


def by_head(rows: Sequence[dict[str, Any]], lost: bool) -> dict[tuple[int, int], tuple[float, float]]:
    """(layer, head) -> mass per prompt, and the part of it that lies in chosen blocks, of the prompts looked at."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    looked_at = [row for row in rows if "layers" in row and (row["margin"] <= 0) == lost]
    for row in looked_at:
        for entry in row["layers"]:
            where = entry["layer"], entry["head"]
            sums[where] = sums.get(where, np.zeros(2)) + np.array((entry["mass"], entry["chosen"]))
    return {where: (mass / len(looked_at), chosen / max(mass, 1e-9)) for where, (mass, chosen) in sums.items()}


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    panels = {}
    for name, lost in (("found", False), ("lost", True)):
        heads = by_head(rows, lost)
        if not heads:
            continue
        layers, count = sorted({layer for layer, _ in heads}), 1 + max(head for _, head in heads)
        masses, shares = ([[heads[at, head][i] for at in layers] for head in range(count)] for i in (0, 1))
        panels[f"{name}: attention to the number"] = masses
        panels[f"{name}: left out by the choice"] = (np.array(masses) * (1 - np.array(shares))).tolist()
    if panels:  # none where nothing was lost and nothing else looked at
        plot_heatmaps(panels, path, x_label="sparse layer", y_label="key/value head", columns=2)


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    lost = [row for row in rows if row["margin"] <= 0]
    lines = [f"lost: {len(lost)} of {len(rows)}"]
    if lost:
        again = sum(row["oracle_margin"] > 0 for row in lost)
        lines.append(f"found with the blocks of most dense mass: {again} of these {len(lost)}")
        found, missed = by_head(rows, False), by_head(rows, True)
        worst = sorted(missed, key=lambda head: -missed[head][0] * (1 - missed[head][1]))[:5]
        lines += [
            f"layer {layer}, head {head}: attention to the number {missed[layer, head][0]:.2f} a prompt, "
            f"in chosen blocks {missed[layer, head][1]:.0%}, where found {found.get((layer, head), (0, 0))[1]:.0%}"
            for layer, head in worst
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output", metavar="OUTPUT.json")
    add("model", metavar="MODEL", help="with sparse layers; a directory or hub id")
    add("--dense", metavar="MODEL", help="a dense model to ask too")
    add("--length", type=int, default=8192, help="tokens of prompt and answer (default: %(default)s)")
    add("--depths", type=int, default=6, help="of the number, from 0 to 1 (default: %(default)s)")
    add("--trials", type=int, default=100, help="prompts per depth (default: %(default)s)")
    add("--found", type=int, default=60, help="prompts that are not lost to look at too (default: %(default)s)")
    add("--dtype", default="bfloat16", help="(default: %(default)s)")
    add("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    try:
        require_matplotlib()
        if not Path(args.output).absolute().parent.is_dir():
            raise NSAError(f"there is no folder {Path(args.output).parent} to write into")
        where = {"dtype": args.dtype, "device": args.device or default_device()}
        model, tokenizer = load_model(args.model, **where)
        dense = load_model(args.dense, **where)[0] if args.dense else None
        sizes = {name: getattr(args, name) for name in ("length", "depths", "trials", "found")}
        rows = study(model.eval(), tokenizer, dense=None if dense is None else dense.eval(), **sizes)
    except (ValueError, OSError) as error:  # NSAError is a ValueError
        print(f"needle_study: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "device", "dtype")}
    settings |= environment_of(model)
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    text = f'{{\n"settings": {json.dumps(settings)},\n"prompts": [\n{lines}\n]\n}}\n'
    path = Path(args.output)
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    _draw(rows, path.with_suffix(".png"))
    print(_summary(rows))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
