# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: plain data, text tables, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .diagnosis import NEIGHBOURS, Diagnosis
from .loss import PositionBucket, RecallGroup, difference_interval, format_table, mean_loss, position_rows
from .plots import plot_bars, plot_heatmaps, plot_position_loss
from .tasks import TASKS, Retention, TaskResult, pool_results, retention

__all__ = ["EvaluationReport", "Section", "Table"]

BRANCHES = ("compressed", "selected", "window")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums; font-size: 13px; }
caption { text-align: left; font-weight: 600; padding: .3em 0; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
tfoot td { border-top: 1px solid #888; }
img { max-width: 100%; }
"""


class Table(NamedTuple):
    """Cells of a table; `summary` is a last row set apart. Prints as text, and shows as HTML in a notebook."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: Sequence[str] | None = None

    def __repr__(self) -> str:
        return f"{self.title}\n{format_table(*self[1:])}"

    def _repr_html_(self) -> str:
        return _html_table(self)


class Section(NamedTuple):
    """A part of the report; a figure is (caption, what draws it into a binary file)."""

    title: str
    about: str
    tables: Sequence[Table]
    figures: Sequence[tuple[str, Callable[[BinaryIO], None]]] = ()


@dataclasses.dataclass
class EvaluationReport:
    """What `evaluate` measured, by label of the model; the one compared with comes first.

    Attributes:
        models: label -> name of the model.
        model: label of the first model.
        against: label of the one compared with, or None.
        texts: text -> tokens of each piece of it that was read.
        settings: of the evaluation.
        environment: versions, device, date.
        positions: text -> label -> loss by position.
        recall: text -> label -> loss of recalled n-grams.
        tasks: label -> results.
        diagnosis: text -> label -> diagnosis.
        suites: label -> task of lm_eval -> metric -> value.
    """

    models: dict[str, str]
    model: str
    against: str | None
    texts: dict[str, list[int]]
    settings: dict[str, Any]
    environment: dict[str, str]
    positions: dict[str, dict[str, list[PositionBucket]]] = dataclasses.field(default_factory=dict)
    recall: dict[str, dict[str, list[RecallGroup]]] = dataclasses.field(default_factory=dict)
    tasks: dict[str, list[TaskResult]] = dataclasses.field(default_factory=dict)
    diagnosis: dict[str, dict[str, Diagnosis]] = dataclasses.field(default_factory=dict)
    suites: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def retention(self) -> dict[str, list[Retention]]:
        """Label -> what it keeps of the model compared with."""
        if self.against not in self.tasks:
            return {}
        dense = self.tasks[self.against]
        seed = self.settings["seed"]
        return {label: retention(dense, own, seed=seed) for label, own in self.tasks.items() if label != self.against}

    def order(self, labels: Sequence[str]) -> None:
        """Put the models into this order everywhere."""
        for by_label in (
            *self.positions.values(),
            *self.recall.values(),
            self.tasks,
            *self.diagnosis.values(),
            self.suites,
        ):
            for label in labels:
                if label in by_label:
                    by_label[label] = by_label.pop(label)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; losses in nats per token.

        `model`, `against`, `text`, `positions`, `retention` and their kin are the first model's on the first text; all
        models and texts follow.
        """
        report: dict[str, Any] = {
            "model": self.models[self.model],
            "against": None if self.against is None else self.models[self.against],
        }
        if self.positions:
            text, by_label = next(iter(self.positions.items()))
            own = by_label[self.model]
            lengths = self.texts[text]
            report |= {"text": text, "length": max(lengths), "slices": len(lengths)}
            report |= {"loss": mean_loss(own), "positions": _dicts(own)}
            if self.against is not None:
                dense = by_label[self.against]
                report |= {"against_loss": mean_loss(dense), "against_positions": _dicts(dense)}
                report["difference_95"] = [difference_interval(*pair) for pair in zip(dense, own)]
        if self.model in self.retention:
            report["retention"] = _dicts(self.retention[self.model])
        return report | {
            "models": self.models,
            "texts": self.texts,
            "settings": self.settings,
            "environment": self.environment,
            "positions_by_text": _nested(self.positions),
            "recall_by_text": _nested(self.recall),
            "tasks": {
                label: [{**row._asdict(), "mean": row.mean} for row in rows] for label, rows in self.tasks.items()
            },
            "retention_by_model": {label: _dicts(rows) for label, rows in self.retention.items()},
            "diagnosis": {
                text: {label: each.to_dict() for label, each in by_label.items()}
                for text, by_label in self.diagnosis.items()
            },
            "suites": self.suites,
        }

    def sections(self) -> list[Section]:
        """Everything measured, as tables and figures."""
        return [
            *(self._loss_section(text) for text in self.positions),
            *([self._task_section()] if self.tasks else []),
            *(self._diagnosis_section(text, label) for text in self.diagnosis for label in self.diagnosis[text]),
            *([self._suite_section()] if self.suites else []),
        ]

    def text(self) -> str:
        """The tables as text."""
        parts = []
        for section in self.sections():
            parts.append(f"{section.title}\n{section.about}")
            parts += map(repr, section.tables)
        return "\n\n".join(parts)

    def html(self) -> str:
        """One page with all tables and figures."""
        title = f"Evaluation of {self.models[self.model]}"
        facts = [*self.environment.items(), *((name, str(value)) for name, value in self.settings.items())]
        body = [f"<h1>{html.escape(title)}</h1>", _html_table(Table("", ("model", "name"), list(self.models.items())))]
        for section in self.sections():
            body += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.about)}</p>"]
            for caption, draw in section.figures:
                png = io.BytesIO()
                draw(png)
                data = base64.b64encode(png.getvalue()).decode()
                body.append(f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}"></p>')
            body += map(_html_table, section.tables)
        body += ["<h2>How it was measured</h2>", _html_table(Table("", ("setting", "value"), facts))]
        head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        return "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])

    def save(self, directory: str | Path) -> tuple[Path, Path]:
        """Write `eval.json` and `eval.html` into `directory`, made if missing; return their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_path, html_path = directory / "eval.json", directory / "eval.html"
        # a line per part: most of it are lists of numbers
        parts = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in self.to_dict().items())
        json_path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        html_path.write_text(self.html(), encoding="utf-8")
        return json_path, html_path

    def _loss_section(self, text: str) -> Section:
        series, lengths = self.positions[text], self.texts[text]
        difference = None if self.against is None else f"{self.model} - {self.against}"
        many = f"{len(lengths)} x {max(lengths):,} tokens"
        return Section(
            f"Loss on {text}",
            f"Nats per token, {many}. Intervals: 95 %, bootstrap over texts, paired.",
            [
                Table("by position", *position_rows(series, difference)),
                Table("on what repeats an earlier passage", *position_rows(self.recall[text], difference)),
            ],
            [("loss by position", functools.partial(plot_position_loss, series, title=f"Loss by position, {many}"))],
        )

    def _task_section(self) -> Section:
        pooled = {label: pool_results(results) for label, results in self.tasks.items()}
        first = next(iter(pooled.values()))
        scores = {
            label: {key: sum(rows) / len(rows) for key, (_, rows) in cells.items()} for label, cells in pooled.items()
        }
        rows = [
            [
                name,
                f"{length:,}",
                f"{chance:.3f}",
                *(f"{scores[label][name, length]:.3f}" for label in pooled),
                len_text,
            ]
            for (name, length), (chance, trials) in first.items()
            for len_text in [f"{len(trials)}"]
        ]
        tables = [Table("scores", ("task", "tokens", "chance", *pooled, "trials"), rows)]
        tables += [
            Table(
                f"retention of {label}: (score - chance) / ({self.against} - chance), where that is surely large",
                ("task", "tokens", "retention", "95 % interval"),
                [_retention_row(row) for row in kept],
            )
            for label, kept in self.retention.items()
        ]
        whole = [key for key in first if key[0] in TASKS]
        names = [f"{name} {length:,}" for name, length in whole]
        bars = {label: [scores[label][key] for key in whole] for label in pooled}
        figures = [("scores", functools.partial(plot_bars, bars, names, title="Scores of the tasks", y_label="score"))]
        figures += [
            (f"{name} by depth and length", functools.partial(self._draw_depths, name))
            for name, _ in dict.fromkeys(
                (row.task, None) for row in next(iter(self.tasks.values())) if row.depth is not None
            )
        ]
        about = "Share of right answers, greedy or by likelihood. " + ". ".join(
            f"{name}: {TASKS[name].about}" for name in dict.fromkeys(name for name, _ in whole)
        )
        return Section("Retrieval tasks", about + ".", tables, figures)

    def _draw_depths(self, name: str, path: BinaryIO) -> None:
        cells = {
            label: {(row.depth, row.length): row.mean for row in rows if row.task == name}
            for label, rows in self.tasks.items()
        }
        depths, lengths = (sorted({key[i] for key in next(iter(cells.values()))}) for i in range(2))
        plot_heatmaps(
            {f"{name}, {label}": [[cell[d, t] for t in lengths] for d in depths] for label, cell in cells.items()},
            path,
            x_label="tokens",
            y_label="depth",
            x_names=[f"{length:,}" for length in lengths],
            y_names=[f"{depth:.0%}" for depth in depths],
            limits=(0.0, 1.0),
        )

    def _diagnosis_section(self, text: str, label: str) -> Section:
        found = self.diagnosis[text][label]
        columns = {
            "block recall": found.block_recall,
            "mass recall": found.mass_recall,
            "of the dense choice": found.dense_mass_recall,
            **{
                f"g {name}": [[head[i] for head in layer] for layer in found.gate_mean]
                for i, name in enumerate(BRANCHES)
            },
            **{f"{size} queries": found.unions[str(size)] for size in NEIGHBOURS},
        }
        means = {name: [sum(layer) / len(layer) for layer in layers] for name, layers in columns.items()}
        rows = [
            [str(layer), *(f"{values[i]:.3f}" for values in means.values())] for i, layer in enumerate(found.layers)
        ]
        summary = ["all", *(f"{sum(values) / len(values):.3f}" for values in means.values())]
        recall = {name: columns[name] for name in list(columns)[:3]}
        heads = functools.partial(plot_heatmaps, x_label="head", y_label="sparse layer")
        gates = {f"mean gate, {name}": columns[f"g {name}"] for name in BRANCHES}
        return Section(
            f"Selection of {label} on {text}",
            f"{found.tokens:,} queries a layer, all beyond the reach of the selected blocks. Dense choice: the blocks "
            "with most dense attention mass. Block recall: share of them that were selected. Mass recall: share of the "
            "mass in the selected blocks. Queries: blocks that so many neighbouring ones need together.",
            [
                Table("loss with the model's own blocks, the dense choice (oracle), the first and last blocks (recent)",
                      *position_rows(found.losses, "difference")),
                Table("by layer, mean over heads", ("layer", *columns), rows, summary),
            ],
            [
                ("recall", functools.partial(heads, recall, limits=(0.0, 1.0))),
                ("gates", functools.partial(heads, gates)),
            ],
        )  # fmt: skip

    def _suite_section(self) -> Section:
        metrics = {
            (task, metric): None
            for results in self.suites.values()
            for task, values in results.items()
            for metric, value in values.items()
            if not isinstance(value, str)
        }
        rows = [
            [task, metric, *(_number(results.get(task, {}).get(metric)) for results in self.suites.values())]
            for task, metric in metrics
        ]
        return Section("Standard suites", "Metrics of lm_eval.", [Table("", ("task", "metric", *self.suites), rows)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _retention_row(row: Retention) -> list[str]:
    length = "" if row.length is None else f"{row.length:,}"
    if row.value is None:
        return [row.name, length, "not compared", ""]
    return [row.name, length, f"{row.value:.1%}", f"{row.low:.1%} … {row.high:.1%}"]


def _dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [row._asdict() for row in rows]


def _nested(series: dict[str, dict[str, list]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {text: {label: _dicts(rows) for label, rows in by_label.items()} for text, by_label in series.items()}


def _html_table(table: Table) -> str:
    def line(cells, tag="td"):
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    foot = "" if table.summary is None else f"<tfoot>{line(table.summary)}</tfoot>"
    body = "".join(map(line, table.rows))
    return f"<table>{caption}<thead>{line(table.header, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"
