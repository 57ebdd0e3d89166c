# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Compare a converted model with its source: equal logits up to n·l' tokens, loss by position beyond."""

from dataclasses import asdict, dataclass

from nsa_conversion.errors import NSAError

__all__ = ["VerifyReport", "verify"]

# Logits of equal models differ by the rounding of fp32 sums, relative to the largest logit.
TOLERANCE = 1e-4
_CHUNK = 256


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` measured; both models run in float32.

    Attributes:
        exact_tokens (int): T of the logit comparison, at most n·l'.
        max_abs_logit_diff (float): max |Δlogit| over these tokens.
        max_abs_logit (float): the source's largest |logit| there.
        exact (bool | None): the difference is rounding only; None if equality is not to be expected.
        reason (str | None): why it is not: the conversion rounded the weights, or has no `gate_scale`.
        length (int): tokens of the loss comparison.
        losses (dict[str, tuple[PositionBucket, ...]]): loss by position of `"source"` and `"NSA"`, nats per token.
        text (str): what was read: `"the given text"`, `"built-in text"` or `"random tokens"`.
    """

    exact_tokens: int
    max_abs_logit_diff: float
    max_abs_logit: float
    exact: bool | None
    reason: str | None
    length: int
    losses: dict[str, tuple]
    text: str

    def to_dict(self) -> dict:
        losses = {name: [bucket._asdict() for bucket in buckets] for name, buckets in self.losses.items()}
        return asdict(self) | {"losses": losses}

    def __str__(self):
        from nsa_conversion.loss import format_position_table

        verdict = {True: "equal", False: "NOT equal", None: self.reason}[self.exact]
        return "\n".join(
            [
                f"max |Δlogit| over {self.exact_tokens:,} tokens: {self.max_abs_logit_diff:.3e} "
                f"(largest |logit| {self.max_abs_logit:.1f}): {verdict}",
                "",
                f"loss by position, {self.length:,} tokens of {self.text}:",
                format_position_table(self.losses, difference="NSA - source"),
            ]
        )


def verify(
    source,
    dest,
    *,
    text: str | None = None,
    length: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: bool = False,
) -> VerifyReport:
    """Load a source and its conversion and compare them.

    Args:
        source (str | Path): the dense checkpoint, as for `convert`.
        dest (str | Path): the converted one.
        text (str | None): to read; built-in English by default, random tokens if there is no tokenizer.
        length (int | None): tokens of the loss comparison; 4·n·l' by default, at most what the text and
            `max_position_embeddings` allow.
        revision (str | None), trust_remote_code (bool), allow_pickle (bool): as for `convert`.
        progress (bool): show progress bars on stderr.

    Returns:
        VerifyReport: differences and losses; `print` shows them as a table.

    Raises:
        NSAError: a model cannot be loaded, `dest` is not an NSA model, the text is shorter than two tokens.
    """
    import torch
    from transformers import AutoConfig

    from nsa_conversion.key_map import changed_window
    from nsa_conversion.loss import loss_by_position, position_edges
    from nsa_conversion.sources import find_model, load_model, resolve

    if length is not None and length < 2:
        raise NSAError(f"length must be at least 2 tokens, got {length}.")
    # The same refusals as in a conversion: pickle and remote code only when asked for.
    found = resolve(source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    nsa, tokenizer = load_model(dest, dtype="float32")
    config = nsa.config
    if config.model_type != "native_sparse_attention":
        raise NSAError(f"{str(dest)!r} is not a converted model (model_type {config.model_type!r}).")
    dense, _ = load_model(source, dtype="float32", revision=revision, trust_remote_code=trust_remote_code)

    selected = config.num_selected_blocks * config.select_block_size
    wanted = length or 4 * selected
    ids, origin = _token_ids(tokenizer, text, min(wanted, config.max_position_embeddings), config.vocab_size)
    exact_tokens = min(selected, changed_window(found.config, config.layer_types), ids.shape[1])

    difference = largest = 0.0
    with torch.no_grad():
        short = ids[:, :exact_tokens]
        states = [model.get_decoder()(short, use_cache=False).last_hidden_state for model in (dense, nsa)]
        for start in range(0, exact_tokens, _CHUNK):
            # The logits of all positions at once could be larger than the model.
            expected, got = (
                model.lm_head(state[:, start : start + _CHUNK]) for model, state in zip((dense, nsa), states)
            )
            difference = max(difference, (expected - got).abs().max().item())
            largest = max(largest, expected.abs().max().item())

    edges = position_edges(ids.shape[1])
    losses = {
        name: tuple(loss_by_position(model, ids, edges, progress=progress, description=name))
        for name, model in (("source", dense), ("NSA", nsa))
    }
    reason = None
    if not config.gate_scale:
        reason = "without gate scales (--no-gate-scale) it does not start out equal"
    elif _epsilon(AutoConfig.from_pretrained(find_model(dest) or dest).dtype) > _epsilon(_stored_dtype(found)):
        reason = "the weights were rounded to another dtype"
    return VerifyReport(
        exact_tokens=exact_tokens,
        max_abs_logit_diff=difference,
        max_abs_logit=largest,
        exact=difference <= TOLERANCE * largest if reason is None else None,
        reason=reason,
        length=ids.shape[1],
        losses=losses,
        text=origin,
    )


def _token_ids(tokenizer, text, length, vocab_size):
    """[1, T] token ids, T <= length, and what they are."""
    import torch

    if tokenizer is None:
        if text is not None:
            raise NSAError("a text was given, but the converted model has no tokenizer to read it with.")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (1, length), generator=generator), "random tokens"
    origin = "the given text"
    if text is None:
        from nsa_conversion.data import builtin_text

        text, origin = builtin_text(), "built-in text"
    # Far more characters than tokens are wanted; the rest of a long text need not be tokenised.
    ids = tokenizer(text[: 32 * length], return_tensors="pt")["input_ids"][:, :length]
    if ids.shape[1] < 2:
        raise NSAError(f"the text must have at least 2 tokens, got {ids.shape[1]}.")
    return ids, origin


def _stored_dtype(source):
    """The dtype of a source's weights: what its configuration says, else its tensors."""
    from nsa_conversion.sources import open_tensors

    if source.kind == "gguf":
        return "float32"
    return source.config.dtype or open_tensors(source).specs["model.embed_tokens.weight"].dtype


def _epsilon(dtype):
    """Rounding step of a dtype."""
    import torch

    from nsa_conversion.sources import parse_dtype

    return torch.finfo(parse_dtype(dtype)).eps
