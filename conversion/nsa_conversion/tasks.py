# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Retrieval tasks in the manner of RULER (arXiv 2404.06654) and of associative recall (arXiv 2312.04927), made offline.

A task hides facts in a haystack of local text and asks for them. Its prompt is fitted to a number of tokens whatever
the tokenizer, put into the chat template where there is one, and ends with the first words of the answer. It is scored
in one of two ways:

- Generation, where the answer is a number that no guess would hit: the share of the expected numbers that greedy
  decoding writes. Small models can do this.
- Choice, where small models cannot write the answer, so that all would score zero: with the right words up to there as
  context, is each right word likelier than every wrong one? They are compared at the first token in which they differ,
  all in one forward pass.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .errors import NSAError, listing
from .loss import RESAMPLES
from .sources import check_token_ids

__all__ = [
    "TASKS",
    "Retention",
    "Task",
    "TaskResult",
    "Trial",
    "choice_margins",
    "make_trials",
    "pool_results",
    "retention",
    "run_task",
    "task_cells",
]

# Retention is a ratio: it means something only where the dense model can do the task.
MIN_DENSE_SCORE, MIN_SURELY_ABOVE_CHANCE = 0.5, 0.2
MIN_WORDS = 200
# More than the answer's own tokens, for a model that says a few words first.
SPARE_TOKENS = 8

COMMON_WORDS, COMMON_REPEATS, UNCOMMON_REPEATS = 8, 20, 2
CODED_WORDS, FREQUENT_WORDS = 12, 3
WRONG_ANSWERS = 3
CHAINS, HOPS = WRONG_ANSWERS + 1, 4
RECALL_PAIRS = 16


class Draft(NamedTuple):
    """A prompt before it is fitted to a length.

    Attributes:
        intro, question: before and after the haystack.
        filler: makes the first N pieces of the haystack.
        needles: (depth, text): text goes in after this share of the pieces.
        joiner: between pieces.
        lead: the first words of the answer.
        answers: what has to be generated, or the words to be chosen, each with what goes before it.
        wrong: for every word to be chosen, the same with the wrong words; empty for generation.
    """

    intro: str
    question: str
    filler: Callable[[int], Sequence[str]]
    needles: Sequence[tuple[float, str]]
    joiner: str
    lead: str
    answers: Sequence[str]
    wrong: Sequence[Sequence[str]] = ()


class Task(NamedTuple):
    """One task.

    Attributes:
        draft: (random numbers, material, depth) -> `Draft`.
        chance: score of a model that guesses.
        by_depth: whether it has one needle, to be put at given depths.
        about: one line for people.
    """

    draft: Callable[[random.Random, Material, float], Draft]
    chance: float
    by_depth: bool
    about: str


class Trial(NamedTuple):
    """A prompt as tokens, and what is expected.

    Attributes:
        prompt: token ids, chat template and the first words of the answer included.
        answers: what has to be generated; empty for a choice.
        continuation: token ids of the right words of a choice, one after the other.
        contests: for every right word, (index into `continuation`, right token, wrong token) per wrong word.
        max_new_tokens: tokens to generate.
    """

    prompt: list[int]
    answers: tuple[str, ...] = ()
    continuation: tuple[int, ...] = ()
    contests: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    max_new_tokens: int = 0

    @property
    def highest_id(self) -> int:
        """The highest token id that is read or compared."""
        wrong = (wrong for contest in self.contests for _, _, wrong in contest)
        return max((*self.prompt, *self.continuation, *wrong))


class TaskResult(NamedTuple):
    """Scores of one task at one length, and at one depth where it has them; every score lies in [0, 1]."""

    task: str
    length: int
    depth: float | None
    chance: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


class Material:
    """Sentences and words of a text.

    Raises:
        NSAError: the text has too few words.
    """

    def __init__(self, text: str):
        pieces = (" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
        self.sentences = [piece for piece in pieces if 20 <= len(piece) <= 400]
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        if len(self.words) < MIN_WORDS or not self.sentences:
            raise NSAError(
                f"the tasks need a text of sentences with at least {MIN_WORDS} different words of 4 to 9 letters, "
                f"got {len(self.words)} in {len(self.sentences)} sentences; give a longer text"
            )

    def prose(self, rng: random.Random) -> Callable[[int], list[str]]:
        """Sentences in the text's own order from a random one on."""
        start = rng.randrange(len(self.sentences))
        return lambda count: [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The tasks
# ---------------------------------------------------------------------------------------------------------------------


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def _passkey(rng: random.Random, material: Material, depth: float) -> Draft:
    (number,) = _numbers(rng, 1)
    sentence = f"The secret pass key number is: {number}."
    return Draft(
        intro="A secret pass key number is hidden in the following text. Make sure to memorize it.",
        question="What is the secret pass key number mentioned in the text?",
        filler=material.prose(rng),
        needles=[(depth, f"{sentence} Remember it. {sentence}")],
        joiner=" ",
        lead="The secret pass key number mentioned in the text is:",
        answers=[number],
    )


def _needles(keys: int, values: int, asked: int) -> Callable[[random.Random, Material, float], Draft]:
    """Magic numbers for `keys` words, `values` of them per word; `asked` of the words are asked for."""

    def draft(rng, material, depth):
        words = rng.sample(material.words, keys)
        numbers = dict(zip(words, _batches(_numbers(rng, keys * values), values)))
        needles = [
            (
                depth if keys * values == 1 else rng.random(),
                f"One of the special magic numbers for {word} is: {number}.",
            )
            for word in words
            for number in numbers[word]
        ]
        named = ", ".join(words[:asked])
        what = "the special magic number" if values == asked == 1 else "all the special magic numbers"
        several = values * asked > 1
        return Draft(
            intro="Some special magic numbers are hidden in the following text. Make sure to memorize them.",
            question=f"What {'are' if several else 'is'} {what} for {named} mentioned in the text?",
            filler=material.prose(rng),
            needles=needles,
            joiner=" ",
            lead=f"The special magic number{'s' if several else ''} for {named} mentioned in the text "
            f"{'are' if several else 'is'}:",
            answers=[number for word in words[:asked] for number in numbers[word]],
        )

    return draft


def _choice(hidden: Callable[[random.Random, Material, float], Draft]) -> Callable[..., Draft]:
    """The same number, to be chosen among those of the other needles, or others where there are none."""

    def draft(rng, material, depth):
        whole = hidden(rng, material, depth)
        (right,) = whole.answers
        found = re.findall(r"\d{5}", " ".join(text for _, text in whole.needles))
        wrong = dict.fromkeys(number for number in [*found, *_numbers(rng, WRONG_ANSWERS + 1)] if number != right)
        return whole._replace(
            answers=[_after(0, right)], wrong=[[_after(0, number) for number in list(wrong)[:WRONG_ANSWERS]]]
        )

    return draft


def _variable_tracking(rng: random.Random, material: Material, depth: float) -> Draft:
    names = _batches(rng.sample(material.words, CHAINS * HOPS), HOPS)
    numbers = _numbers(rng, CHAINS)
    needles = []
    for chain, number in zip(names, numbers):
        sources = [number, *(f"VAR {name}" for name in chain)]
        depths = sorted(rng.random() for _ in chain)
        needles += [(at, f"VAR {name} = {source}.") for at, name, source in zip(depths, chain, sources)]
    asked, *others = names
    return Draft(
        intro="Memorize and track the chains of variable assignments hidden in the following text.",
        question=f"Find all variables that are assigned the value {numbers[0]} in the text above.",
        filler=material.prose(rng),
        needles=needles,
        joiner=" ",
        lead=f"The variables that are assigned the value {numbers[0]} are:",
        answers=_listed(asked),
        wrong=[[_after(hop, chain[hop]) for chain in others] for hop in range(HOPS)],
    )


def _common_words(rng: random.Random, material: Material, depth: float) -> Draft:
    common = rng.sample(material.words, COMMON_WORDS)
    others = [word for word in material.words if word not in common]
    rng.shuffle(others)

    def filler(count):
        if count > len(others) * COMMON_REPEATS // 4:
            raise NSAError(f"a list of {count:,} words needs a text of more than {len(others):,} different ones")
        # group by group: a list of any length has most of its words equally often
        groups = (UNCOMMON_REPEATS * group for group in _batches(others, COMMON_WORDS))
        return list(itertools.islice(itertools.cycle(itertools.chain.from_iterable(groups)), count))

    wrong = others[:COMMON_WORDS]  # a short list has these too
    return Draft(
        intro="Below is a list of words. Memorize the ones that appear most often.",
        question=f"What are the {COMMON_WORDS} most common words in the above list?",
        filler=filler,
        needles=[(rng.random(), word) for word in common * COMMON_REPEATS],
        joiner=" ",
        lead=f"The {COMMON_WORDS} most common words in the list are:",
        answers=_listed(common),
        wrong=[[_after(i, wrong[(i + j) % COMMON_WORDS]) for j in range(WRONG_ANSWERS)] for i in range(COMMON_WORDS)],
    )


def _frequent_words(rng: random.Random, material: Material, depth: float) -> Draft:
    coded: list[str] = []
    while len(coded) < CODED_WORDS:
        word = "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 3)
        coded += [word] if word not in coded else []
    weights = [rank**-2.0 for rank in range(1, CODED_WORDS + 1)]
    seed = rng.random()

    def filler(count):
        return random.Random(seed).choices(coded, weights, k=count)

    rare = coded[-WRONG_ANSWERS:]
    return Draft(
        intro="Read the following coded text and track the frequency of each coded word.",
        question=f"What are the {FREQUENT_WORDS} most frequent words in the above coded text?",
        filler=filler,
        needles=[],
        joiner=" ",
        lead=f"The {FREQUENT_WORDS} most frequent words in the coded text are:",
        answers=_listed(coded[:FREQUENT_WORDS]),
        wrong=[[_after(i, word) for word in rare] for i in range(FREQUENT_WORDS)],
    )


def _associative_recall(rng: random.Random, material: Material, depth: float) -> Draft:
    chosen = rng.sample(material.words, 2 * RECALL_PAIRS)
    keys, values = chosen[:RECALL_PAIRS], chosen[RECALL_PAIRS:]
    order = rng.sample(range(RECALL_PAIRS), RECALL_PAIRS)

    def answer(place, value):
        return f" {value}" if place == 0 else f"\n{keys[order[place]]}: {value}"

    return Draft(
        intro="Every name in the following text has a code word. Memorize them.",
        question="List the code word of every name.",
        filler=material.prose(rng),
        needles=[(rng.random(), f"\n{key}: {value}\n") for key, value in zip(keys, values)],
        joiner=" ",
        lead=f"{keys[order[0]]}:",
        answers=[answer(place, values[i]) for place, i in enumerate(order)],
        wrong=[[answer(place, value) for value in values if value != values[i]] for place, i in enumerate(order)],
    )


def _batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _after(place: int, word: str) -> str:
    return f" {word}" if place == 0 else f", {word}"


def _listed(words: Iterable[str]) -> list[str]:
    return [_after(place, word) for place, word in enumerate(words)]


TASKS: dict[str, Task] = {
    "passkey": Task(_passkey, 0.0, True, "one pass key in a long text"),
    "needle": Task(_needles(1, 1, 1), 0.0, True, "one magic number of one word (RULER NIAH, single)"),
    "multikey": Task(_needles(4, 1, 1), 0.0, False, "the number of one of 4 words (NIAH, multi-key)"),
    "multivalue": Task(_needles(1, 4, 1), 0.0, False, "all 4 numbers of one word (NIAH, multi-value)"),
    "multiquery": Task(_needles(4, 1, 4), 0.0, False, "the numbers of 4 words (NIAH, multi-query)"),
    "variable_tracking": Task(
        _variable_tracking, 1 / CHAINS, False, f"{CHAINS} chains of {HOPS} assignments: which variables hold a value"
    ),
    "common_words": Task(
        _common_words, 1 / (1 + WRONG_ANSWERS), False, f"the {COMMON_WORDS} words of a list that come most often"
    ),
    "frequent_words": Task(
        _frequent_words, 1 / (1 + WRONG_ANSWERS), False, f"the {FREQUENT_WORDS} most frequent words of a coded text"
    ),
    "associative_recall": Task(
        _associative_recall,
        1 / RECALL_PAIRS,
        False,
        f"the values of {RECALL_PAIRS} keys (multi-query associative recall)",
    ),
}
# What a model can tell from wrong numbers long before, or further back than, it can write it.
TASKS |= {
    f"{name}_choice": Task(
        _choice(TASKS[name].draft), 1 / (1 + WRONG_ANSWERS), TASKS[name].by_depth, f"{about}, chosen"
    )
    for name, about in {
        "passkey": "the pass key among other numbers",
        "needle": "the magic number among other numbers",
        "multikey": "the number of one of 4 words among those of the others",
    }.items()
}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts of a given length
# ---------------------------------------------------------------------------------------------------------------------


def _render(tokenizer, draft: Draft, count: int) -> str:
    """The prompt with `count` pieces of filler."""
    filler = draft.filler(count)
    pieces, taken = [], 0
    for depth, text in sorted(draft.needles):
        place = round(depth * count)
        pieces += [*filler[taken:place], text]
        taken = place
    body = f"{draft.intro}\n\n{draft.joiner.join([*pieces, *filler[taken:]])}\n\n{draft.question}"
    if tokenizer.chat_template is None:
        return f"{body}\n\n{draft.lead}"
    messages = [{"role": "user", "content": body}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + draft.lead


def _continue(tokenizer, text: str) -> list[int]:
    """Token ids of `text` as they are behind a colon."""
    before, both = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (":", f":{text}"))
    return both[len(before) :]


def _contests(tokenizer, draft: Draft) -> tuple[list[int], list[tuple[tuple[int, int, int], ...]]]:
    """`Trial.continuation` and `Trial.contests`."""
    continuation: list[int] = []
    contests = []
    for answer, wrong in zip(draft.answers, draft.wrong):
        right = _continue(tokenizer, answer)
        places = []
        for ids in (_continue(tokenizer, other) for other in wrong):
            place = next((i for i, pair in enumerate(zip(right, ids)) if pair[0] != pair[1]), None)
            if place is not None:  # one is the beginning of the other: nothing to compare
                places.append((len(continuation) + place, right[place], ids[place]))
        contests.append(tuple(places))
        continuation += right
    return continuation, contests


def _fit(
    name: str, tokenizer, material: Material, length: int, depth: float | None, seed: str
) -> Generator[str, list[int], Trial]:
    """The prompt with as much filler as `length` tokens hold, the answer included; yields text for its token ids."""
    rng = random.Random(seed)
    draft = TASKS[name].draft(rng, material, rng.random() if depth is None else depth)
    continuation, contests = _contests(tokenizer, draft)
    answer_tokens = len(continuation) or sum(len(_continue(tokenizer, f" {answer},")) for answer in draft.answers)
    budget = length - answer_tokens
    count, prompt = 0, (yield _render(tokenizer, draft, 0))
    least = len(prompt)
    if least > budget:
        raise NSAError(
            f"task {name!r} needs at least {least + answer_tokens} tokens of this tokenizer, got a task length of "
            f"{length}; give a longer one or leave the task out"
        )
    too_many, guess = None, 32
    while too_many is None or too_many - count > 1:
        ids = yield _render(tokenizer, draft, guess)
        if len(ids) <= budget:
            count, prompt = guess, ids
        else:
            too_many = guess
        piece = max((len(ids) - least) / guess, 1.0)  # tokens of a piece, on average
        room = (budget - len(prompt)) / piece
        if room < 1:
            break
        guess = count + max(1, math.floor(room))
        guess = guess if too_many is None else min(guess, too_many - 1)
    if draft.wrong:
        return Trial(prompt, continuation=tuple(continuation), contests=tuple(contests))
    return Trial(prompt, answers=tuple(draft.answers), max_new_tokens=answer_tokens + SPARE_TOKENS)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise NSAError(f"task {name!r} is unknown; the tasks are {listing(TASKS)}")
    return TASKS[name]


def make_trials(
    name: str,
    tokenizer,
    text: str | Material,
    length: int,
    *,
    depth: float | None = None,
    trials: int = 10,
    seed: int = 0,
) -> list[Trial]:
    """Prompts of a task; the same arguments give the same prompts.

    Args:
        name: a key of `TASKS`.
        tokenizer: a transformers tokenizer; its chat template is used where it has one.
        text: the haystack.
        length: tokens of prompt and answer at the most; they fall short by less than a sentence.
        depth: share of the text before the needle, in [0, 1]; None draws it.
        trials: number of prompts.
        seed: of what is drawn.

    Raises:
        NSAError: an unknown task, too short a length, or a text of too few words.
    """
    _task(name)
    if trials < 1:
        raise NSAError(f"trials must be at least 1, got {trials}")
    material = text if isinstance(text, Material) else Material(text)
    seeds = (f"{seed} {name} {length} {depth} {trial}" for trial in range(trials))
    searches = [_fit(name, tokenizer, material, length, depth, each) for each in seeds]
    made: dict[int, Trial] = {}
    asked = {place: next(search) for place, search in enumerate(searches)}
    while asked:  # all at once: a fast tokenizer works on many texts in parallel
        texts = list(asked.values())
        ids = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None, verbose=False)["input_ids"]
        for place, own in zip(list(asked), ids):
            try:
                asked[place] = searches[place].send(own)
            except StopIteration as found:
                made[place] = found.value
                del asked[place]
    return [made[place] for place in range(trials)]


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device) -> dict[str, torch.Tensor]:
    """`input_ids` [B, T]; with `attention_mask` and `position_ids` where the rows are not equally long."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    positions = torch.arange(width, device=device) - (width - lengths)[:, None]
    if (lengths == width).all():
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}


def _generated(model, tokenizer, trials: Sequence[Trial]) -> list[float]:
    """The share of the expected answers in what greedy decoding writes."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    inputs = _left_padded([trial.prompt for trial in trials], pad or 0, model.device)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    inputs.pop("position_ids", None)  # `generate` numbers the tokens itself
    # `generate` fills in from the model's own configuration whatever it is not told: penalties, beams, sampling.
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad or 0)
    try:
        longest = max(trial.max_new_tokens for trial in trials)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
    finally:
        model.generation_config = own
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [sum(answer in text for answer in trial.answers) / len(trial.answers) for trial, text in zip(trials, texts)]


@torch.no_grad()
def choice_margins(model, tokenizer, trials: Sequence[Trial]) -> list[list[list[float]]]:
    """By how much every right word of choices is likelier than each wrong one, in nats, at the token where they differ.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer, trials: as in `make_trials` and from it; shorter prompts are padded on the left.
    """
    rows = [[*trial.prompt, *trial.continuation] for trial in trials]
    kept = max(len(trial.continuation) for trial in trials) + 1
    inputs = _left_padded(rows, tokenizer.pad_token_id or 0, model.device)
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits.float().cpu()
    margins = []
    for trial, row in zip(trials, logits):
        row = row[kept - 1 - len(trial.continuation) :]
        margins.append([[(row[i, right] - row[i, wrong]).item() for i, right, wrong in c] for c in trial.contests])
    return margins


def _chosen(model, tokenizer, trials: Sequence[Trial]) -> list[float]:
    """The share of right words that are likelier than every wrong one."""
    margins = choice_margins(model, tokenizer, trials)
    return [sum(min(contest, default=1.0) > 0 for contest in own) / len(own) for own in margins]


def task_cells(tasks: Sequence[str], lengths: Sequence[int], depths: int) -> list[tuple[str, int, float | None]]:
    """(task, length, depth) of everything to measure, each once.

    Args:
        tasks: keys of `TASKS`.
        lengths: tokens of prompt and answer.
        depths: needle depths, evenly from 0 to 1, of the tasks that have one needle; the others draw theirs.

    Raises:
        NSAError: an unknown task.
    """
    return [
        (name, length, depth)
        for name in dict.fromkeys(tasks)
        for length in dict.fromkeys(lengths)
        for depth in (np.linspace(0, 1, depths).tolist() if _task(name).by_depth else [None])
    ]


@torch.no_grad()
def run_task(
    model,
    tokenizer,
    text: str | Material,
    name: str,
    length: int,
    depth: float | None = None,
    *,
    trials: int = 10,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
    description: str | None = None,
) -> TaskResult:
    """Score a model on one task at one length; equal arguments give every model with this tokenizer the same prompts.

    Args:
        model: a causal language model of transformers; its training mode is restored afterwards.
        tokenizer, text, name, length, depth, trials, seed: as for `make_trials`.
        batch_size: prompts per forward pass; shorter ones are padded on the left.
        progress: show a progress bar.
        description: its label; None is the name of the task.

    Raises:
        NSAError: an unknown task, too short a length, a text of too few words, or a token that the model has no
            embedding for.
    """
    made = make_trials(name, tokenizer, text, length, depth=depth, trials=trials, seed=seed)
    check_token_ids(model, max(trial.highest_id for trial in made))
    score = _generated if made[0].answers else _chosen
    scores: list[float] = []
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=trials, desc=description or name, unit=" prompts", disable=not progress, leave=False) as bar:
            for batch in _batches(made, batch_size):
                scores += score(model, tokenizer, batch)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return TaskResult(name, length, depth, TASKS[name].chance, tuple(scores))


# ---------------------------------------------------------------------------------------------------------------------
# Retention
# ---------------------------------------------------------------------------------------------------------------------


class Retention(NamedTuple):
    """What a model keeps of the dense one: `(score - chance) / (dense - chance)`, with a 95 % bootstrap interval.

    `value`, `low` and `high` are None where the dense model is not well above chance. `length` is None for the average.
    """

    name: str
    length: int | None
    trials: int
    chance: float | None
    dense: float | None
    score: float | None
    value: float | None
    low: float | None
    high: float | None


def pool_results(results: Sequence[TaskResult]) -> dict[tuple[str, int], tuple[float, list[float]]]:
    """(name, length) -> chance and scores: of every task over all depths, and by thirds where there are depths."""
    pooled: dict[tuple[str, int], tuple[float, list[float]]] = {}
    for result in results:
        names = [result.task]
        if result.depth is not None:
            names.append(f"{result.task}, {('first', 'middle', 'last')[min(int(3 * result.depth), 2)]} third")
        for name in names:
            pooled.setdefault((name, result.length), (result.chance, []))[1].extend(result.scores)
    return pooled


def _well_above(scores: Sequence[float], chance: float) -> bool:
    """At least 0.5, and beyond a fifth of the way from chance to 1 by the 95 % interval of Agresti and Coull."""
    count = len(scores) + 4
    center = (sum(scores) + 2) / count
    lower = center - 1.96 * math.sqrt(center * (1 - center) / count)
    surely_above = (lower - chance) / (1 - chance) > MIN_SURELY_ABOVE_CHANCE
    return sum(scores) / len(scores) >= MIN_DENSE_SCORE and surely_above


def retention(dense: Sequence[TaskResult], results: Sequence[TaskResult], *, seed: int = 0) -> list[Retention]:
    """Compare a model with the dense one on the same trials.

    A ratio is given where the dense model's mean is at least 0.5 and well above chance. Trials are drawn together for
    both models. The last row is the average over the tasks that have a ratio (thirds aside).

    Args:
        dense: results of the dense model.
        results: of the other one, on the same tasks, lengths and trials.
        seed: of the draws.
    """
    rows, ratios = [], []
    others = pool_results(results)
    for (name, length), (chance, scores) in pool_results(dense).items():
        first, second = np.asarray(scores) - chance, np.asarray(others[name, length][1]) - chance
        draws = np.random.default_rng(seed).integers(len(first), size=(RESAMPLES, len(first)))
        base, other = first[draws].mean(axis=1), second[draws].mean(axis=1)
        value = low = high = None
        if _well_above(scores, chance):
            ratio = other / np.maximum(base, np.finfo(float).tiny)
            value = second.mean() / first.mean()
            low, high = np.quantile(ratio, [0.025, 0.975])
            if "third" not in name:
                ratios.append((value, ratio))
        means = (float(first.mean() + chance), float(second.mean() + chance))
        interval = (None if end is None else float(end) for end in (value, low, high))
        rows.append(Retention(name, length, len(first), chance, *means, *interval))
    if ratios:
        values, together = zip(*ratios)
        ends = np.quantile(np.mean(together, axis=0), [0.025, 0.975])
        average = (float(np.mean(values)), *map(float, ends))
        rows.append(
            Retention(f"average of {len(ratios)}", None, sum(row.trials for row in rows), None, None, None, *average)
        )
    return rows
