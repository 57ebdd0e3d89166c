# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
import random
import re

import pytest
import tiny_nsa
import torch
from tiny import make_model, make_tokenizer

from nsa_conversion.data import builtin_text
from nsa_conversion.errors import NSAError
from nsa_conversion.tasks import (
    TASKS,
    Material,
    TaskResult,
    Trial,
    make_trials,
    pool_results,
    retention,
    run_task,
    task_cells,
)

LENGTH = 3000  # tokens of the byte-level tokenizer: characters


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def material():
    return Material(builtin_text())


def tokens(trial):
    return len(trial.prompt) + len(trial.continuation)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fit_and_repeat(tokenizer, material, name):
    trials = make_trials(name, tokenizer, material, LENGTH, trials=2)
    assert trials == make_trials(name, tokenizer, material, LENGTH, trials=2)
    assert trials[0] != trials[1]
    assert trials != make_trials(name, tokenizer, material, LENGTH, trials=2, seed=1)
    for trial in trials:
        assert LENGTH - 500 < tokens(trial) <= LENGTH  # short by less than the longest sentence and the answer
        text = tokenizer.decode(trial.prompt)
        assert text.startswith("<|user|>")
        assert "<|assistant|>" in text
        assert bool(trial.answers) != bool(trial.contests)
        assert all(answer in text for answer in trial.answers)


@pytest.mark.parametrize(("name", "hidden"), [("passkey_choice", False), ("multikey_choice", True)])
def test_wrong_numbers_are_those_of_the_other_needles_where_there_are_some(material, name, hidden):
    draft = TASKS[name].draft(random.Random(0), material, 0.5)
    text = " ".join(text for _, text in draft.needles)
    (wrong,) = draft.wrong
    assert draft.answers[0].strip() in text
    assert len({*wrong, *draft.answers}) == 4
    assert [number.strip() in text for number in wrong] == [hidden] * 3


def test_a_tokenizer_without_chat_template_gets_plain_text(tmp_path, material):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = None
    (trial,) = make_trials("passkey", tokenizer, material, LENGTH, trials=1)
    text = tokenizer.decode(trial.prompt)
    assert text.startswith("A secret pass key number is hidden")
    assert text.endswith("mentioned in the text?\n\nThe secret pass key number mentioned in the text is:")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(tokenizer, material, depth):
    (trial,) = make_trials("needle", tokenizer, material, LENGTH, depth=depth, trials=1)
    place = tokenizer.decode(trial.prompt).index("One of the special magic numbers") / LENGTH
    assert place == pytest.approx(depth, abs=0.2)


def test_needles_carry_their_numbers(tokenizer, material):
    (trial,) = make_trials("multiquery", tokenizer, material, LENGTH, trials=1)
    text = tokenizer.decode(trial.prompt)
    found = dict(re.findall(r"magic numbers for (\w+) is: (\d{5})\.", text))
    asked = re.search(r"magic numbers for ([\w, ]+) mentioned in the text are:$", text)[1].split(", ")
    assert trial.answers == tuple(found[word] for word in asked)
    assert len(asked) == 4


def test_variables_form_chains_in_order(tokenizer, material):
    (trial,) = make_trials("variable_tracking", tokenizer, material, LENGTH, trials=1)
    text = tokenizer.decode(trial.prompt)
    chain = tokenizer.decode(trial.continuation).strip().split(", ")
    number = re.search(r"assigned the value (\d+) are:$", text)[1]
    sources = [number, *(f"VAR {name}" for name in chain)]
    places = [text.index(f"VAR {name} = {source}.") for name, source in zip(chain, sources)]
    assert places == sorted(places)


def test_common_words_are_common(tokenizer, material):
    (trial,) = make_trials("common_words", tokenizer, material, LENGTH, trials=1)
    words = tokenizer.decode(trial.prompt).split("\n\n")[1].split()
    common = tokenizer.decode(trial.continuation).strip().split(", ")
    assert {words.count(word) for word in common} == {20}
    assert max(words.count(word) for word in set(words) - set(common)) <= 2
    few = Material(" ".join(material.words[:210]) + ". " + builtin_text()[:400])
    with pytest.raises(NSAError, match="words needs a text of more than"):
        make_trials("common_words", tokenizer, few, 60_000, trials=1)


def test_frequent_words_are_frequent(tokenizer, material):
    (trial,) = make_trials("frequent_words", tokenizer, material, LENGTH, trials=1)
    words = tokenizer.decode(trial.prompt).split("\n\n")[1].split()
    counts = [words.count(word) for word in tokenizer.decode(trial.continuation).strip().split(", ")]
    assert counts[0] > 2 * counts[1] > counts[2] > 5


def test_a_contest_is_where_two_words_first_differ(tokenizer, material):
    (trial,) = make_trials("associative_recall", tokenizer, material, LENGTH, trials=1)
    assert len(trial.contests) == 16
    assert all(0 < len(contest) <= 15 for contest in trial.contests)
    for contest in trial.contests:
        for place, right, wrong in contest:
            assert trial.continuation[place] == right != wrong


class Oracle(torch.nn.Module):
    """Prefers the next token of the rows it was shown."""

    device = torch.device("cpu")

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def get_input_embeddings(self):
        return torch.nn.Embedding(300, 1)

    def forward(self, input_ids, use_cache, logits_to_keep):
        (ids,) = input_ids.tolist()
        logits = torch.zeros(1, len(ids), 300)
        if ids in self.rows:
            logits[0, torch.arange(len(ids) - 1), ids[1:]] = 1.0
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_choice_is_right_where_the_right_word_is_likelier(tokenizer, material):
    trials = make_trials("frequent_words", tokenizer, material, LENGTH, trials=2)
    rows = [[*trial.prompt, *trial.continuation] for trial in trials]
    settings = {"trials": 2, "batch_size": 1}
    assert run_task(Oracle(rows), tokenizer, material, "frequent_words", LENGTH, **settings).scores == (1.0, 1.0)
    assert run_task(Oracle(rows[:1]), tokenizer, material, "frequent_words", LENGTH, **settings).scores == (1.0, 0.0)


def test_generation_counts_the_numbers_it_writes(tokenizer, material):
    model = make_model("llama", max_position_embeddings=4096)
    trials = make_trials("multivalue", tokenizer, material, LENGTH, trials=2)
    written = iter([" ".join(trials[0].answers), f"It is {trials[1].answers[2]}, or 1."])

    def generate(input_ids, max_new_tokens, **settings):
        assert settings["do_sample"] is False
        assert max_new_tokens > sum(map(len, trials[0].answers))
        answer = tokenizer(next(written), return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, answer], dim=1)

    model.generate = generate
    assert run_task(model, tokenizer, material, "multivalue", LENGTH, trials=2).scores == (1.0, 0.25)


def test_generation_is_greedy_whatever_the_generation_config_says(tokenizer, material, monkeypatch):
    model = make_model("llama", max_position_embeddings=1024)
    seen, decode = [], tokenizer.batch_decode
    monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **kwargs: seen.append(ids.tolist()) or decode(ids))
    for settings in ({}, {"repetition_penalty": 9.0, "num_beams": 2, "num_return_sequences": 2, "do_sample": True}):
        model.generation_config.update(**settings)
        run_task(model, tokenizer, material, "passkey", 400, trials=1)
    assert seen[0] == seen[1]
    assert model.generation_config.num_beams == 2
    model.generation_config.eos_token_id = seen[0][0][0]
    run_task(model, tokenizer, material, "passkey", 400, trials=1)
    assert len(seen[2][0]) == 1


@pytest.mark.parametrize("name", ["multikey", "associative_recall"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_batch_scores_as_its_rows(tokenizer, material, name, sparse, monkeypatch):
    maker = tiny_nsa.make_model if sparse else make_model
    model = maker(max_position_embeddings=4096, vocab_size=272)
    seen = []
    if name == "multikey":
        decode = tokenizer.batch_decode
        monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **kwargs: seen.extend(ids.tolist()) or decode(ids))
    else:
        forward = model.forward

        def keep(*args, **kwargs):
            output = forward(*args, **kwargs)
            seen.extend(output.logits[:, -40:].detach())
            return output

        model.forward = keep
    trials = make_trials(name, tokenizer, material, 1500, trials=2)
    cut = [trial._replace(prompt=trial.prompt[-length:]) for trial, length in zip(trials, (200, 151))]
    monkeypatch.setattr("nsa_conversion.tasks.make_trials", lambda *args, **kwargs: cut)
    alone = run_task(model, tokenizer, material, name, 1500, trials=2, batch_size=1)
    together = run_task(model, tokenizer, material, name, 1500, trials=2, batch_size=2)
    assert together == alone
    for one, two in zip(seen[:2], seen[2:]):
        if name == "multikey":
            assert one == two
        else:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["passkey", "frequent_words"])
def test_tokens_without_an_embedding_are_refused(tokenizer, material, name):
    model = make_model("llama", vocab_size=100, max_position_embeddings=1024)
    with pytest.raises(NSAError, match=r"gives token id \d+, but the embedding of the model has 100 rows"):
        run_task(model, tokenizer, material, name, 1000, trials=1)


def test_cells_have_depths_where_there_is_one_needle():
    assert task_cells(["passkey", "multikey"], [100, 200], 3) == [
        *(("passkey", length, depth) for length in (100, 200) for depth in (0.0, 0.5, 1.0)),
        ("multikey", 100, None),
        ("multikey", 200, None),
    ]
    # the same prompts counted twice would make intervals too narrow
    assert task_cells(["multikey", "multikey"], [100, 100], 3) == [("multikey", 100, None)]


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("haystack", {}, "task 'haystack' is unknown; the tasks are passkey, needle"),
        (
            "passkey",
            {"length": 100},
            "task 'passkey' needs at least 313 tokens of this tokenizer, got a task length of 100",
        ),
        ("passkey", {"trials": 0}, "trials must be at least 1, got 0"),
        ("passkey", {"text": "Too few words."}, "at least 200 different words of 4 to 9 letters, got 1 in 0 sentences"),
    ],
)
def test_refused(tokenizer, material, name, settings, error):
    settings = {"text": material, "length": LENGTH} | settings
    with pytest.raises(NSAError, match=error):
        make_trials(name, tokenizer, **settings)
    with pytest.raises(NSAError, match="task 'haystack' is unknown"):
        task_cells(["haystack"], [100], 1)


def results(*means, task="passkey", chance=0.0, trials=40):
    """One result per depth, the first trials right."""
    depths = [None] if len(means) == 1 else [i / (len(means) - 1) for i in range(len(means))]
    return [
        TaskResult(task, 1000, depth, chance, (1.0,) * round(mean * trials) + (0.0,) * (trials - round(mean * trials)))
        for depth, mean in zip(depths, means)
    ]


def test_results_are_pooled_over_depths_and_by_thirds():
    pooled = pool_results(results(1.0, 0.5, 0.0, 1.0, 0.5))
    assert {name: sum(scores) / len(scores) for (name, _), (_, scores) in pooled.items()} == {
        "passkey": 0.6,
        "passkey, first third": 0.75,
        "passkey, middle third": 0.0,
        "passkey, last third": 0.75,
    }


def test_retention_of_a_model_by_itself_is_one():
    rows = retention(results(1.0, 0.5, 1.0), results(1.0, 0.5, 1.0))
    assert [row.name for row in rows] == [
        "passkey",
        "passkey, first third",
        "passkey, middle third",
        "passkey, last third",
        "average of 1",
    ]
    assert all((row.value, row.low, row.high) == (1.0, 1.0, 1.0) for row in rows)


def test_retention_corrects_for_chance_and_averages():
    dense = [*results(1.0, task="a", chance=0.25), *results(0.9, task="b"), *results(0.4, task="c")]
    other = [*results(0.625, task="a", chance=0.25), *results(0.9, task="b"), *results(0.1, task="c")]
    first, second, weak, average = retention(dense, other)
    assert first.value == pytest.approx(0.5)
    assert 0.2 < first.low < 0.5 < first.high < 0.8
    assert second.value == 1
    assert (weak.value, weak.low, weak.high) == (None, None, None)
    assert (average.name, average.length) == ("average of 2", None)
    assert average.value == pytest.approx(0.75)
    assert first.low < average.low < average.value < average.high < 1


@pytest.mark.parametrize(
    ("mean", "chance", "trials"), [(0.45, 0.0, 200), (0.5, 0.0, 6), (1.0, 0.25, 2), (0.5, 0.5, 200)]
)
def test_retention_needs_a_dense_model_well_above_chance(mean, chance, trials):
    dense = results(mean, chance=chance, trials=trials)
    assert [row.value for row in retention(dense, dense)] == [None]


def test_trials_are_plain_data():
    assert Trial([1, 2]).answers == Trial([1, 2]).contests == ()
