# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Draw docs/nsa.svg: which tokens one query sees through each branch. Run `python docs/make_figure.py`.

The sizes are smaller than the paper's, so that single tokens stay visible. Importance and selection are computed by
equation 9 and the rules of the selection from made-up attention logits, so the picture obeys what it shows.
"""

import math
from html import escape
from pathlib import Path

__all__ = ["draw"]

N_TOKENS, QUERY = 128, 115
COMPRESS_BLOCK, COMPRESS_STRIDE = 4, 2
SELECT_BLOCK, N_SELECTED, N_INITIAL, N_LOCAL = 8, 5, 1, 2
WINDOW = 26
# Token positions that the made-up query likes, with their logits.
PEAKS = {3: 1.6, 30: 1.2, 45: 3.0, 50: 2.2, 76: 2.6, 79: 2.4, 93: 1.4, 108: 2.0}

CELL, LEFT, WIDTH = 5.6, 190, 1110
INK, FAINT, LINE = "#1f2937", "#6b7280", "#cbd5e1"
CMP, SLC, FORCED, WIN, EMPTY = "#0f766e", "#c2410c", "#fb923c", "#1d4ed8", "#f1f5f9"


def probabilities() -> list[float]:
    """Softmax over the complete compressed blocks (i·d + l - 1 <= t)."""
    n = (QUERY + 1 - COMPRESS_BLOCK) // COMPRESS_STRIDE + 1
    centres = [i * COMPRESS_STRIDE + (COMPRESS_BLOCK - 1) / 2 for i in range(n)]
    logits = [sum(h * math.exp(-(((c - p) / 2.2) ** 2)) for p, h in PEAKS.items()) for c in centres]
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


def importance(p: list[float]) -> list[float]:
    """Equation 9: every compressed block gives its probability to the selection blocks that it overlaps."""
    ratio, overlap = SELECT_BLOCK // COMPRESS_STRIDE, COMPRESS_BLOCK // COMPRESS_STRIDE
    return [
        sum(p[i] for m in range(ratio) for k in range(overlap) if 0 <= (i := ratio * j + m - k) < len(p))
        for j in range(QUERY // SELECT_BLOCK + 1)
    ]


def selection(imp: list[float]) -> tuple[set[int], set[int]]:
    """The forced blocks (first, own, previous) and the best of the others."""
    own = QUERY // SELECT_BLOCK
    forced = set(range(N_INITIAL)) | {own - i for i in range(N_LOCAL)}
    others = sorted((j for j in range(len(imp)) if j not in forced), key=lambda j: (-imp[j], j))
    return forced, set(others[: N_SELECTED - len(forced)])


def rect(x, y, w, h, fill, opacity=1.0, stroke="none", radius=1.2) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" fill="{fill}" '
        f'fill-opacity="{opacity:.2f}" stroke="{stroke}"/>'
    )


def text(x, y, words, size=13, fill=INK, anchor="start", weight="normal", style="normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}" font-style="{style}">{escape(words)}</text>'
    )


def line(x1, y1, x2, y2, stroke=LINE, width=1.2, extra="") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width}"{extra}/>'


def arrow(x1, y1, x2, y2, stroke) -> str:
    """A line with a filled head; drawn by hand because not every viewer colours SVG markers."""
    length = math.hypot(x2 - x1, y2 - y1)
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    base_x, base_y = x2 - 8 * dx, y2 - 8 * dy
    corners = (
        f"{x2:.1f},{y2:.1f} {base_x - 4 * dy:.1f},{base_y + 4 * dx:.1f} {base_x + 4 * dy:.1f},{base_y - 4 * dx:.1f}"
    )
    return line(x1, y1, base_x, base_y, stroke, 1.8) + f'<polygon points="{corners}" fill="{stroke}"/>'


def tokens(y, colour_of, height=20) -> list[str]:
    """One cell per token; `colour_of(t)` gives the fill of those that are attended to, or None."""
    return [rect(LEFT + t * CELL, y, CELL - 1, height, colour_of(t) or EMPTY, radius=0.8) for t in range(N_TOKENS)]


def label(y, title, *notes, fill=INK) -> list[str]:
    return [text(18, y, title, 15, fill, weight="bold")] + [
        text(18, y + 17 * (i + 1), note, 12, FAINT) for i, note in enumerate(notes)
    ]


def draw() -> str:
    """The SVG as a string."""
    p = probabilities()
    imp = importance(p)
    forced, best = selection(imp)
    right = LEFT + N_TOKENS * CELL
    query_x = LEFT + (QUERY + 0.5) * CELL - 0.5
    y_seq, y_cmp, y_imp, y_slc, y_win, bottom = 52, 122, 188, 258, 342, 400
    out = [text(LEFT, 30, "past tokens, oldest first", 12, FAINT)]

    out += label(y_seq + 14, "sequence")
    out += tokens(y_seq, lambda t: INK if t == QUERY else ("#94a3b8" if t < QUERY else None))
    out.append(line(query_x, y_seq - 8, query_x, y_win + 26, INK, 1.1, ' stroke-dasharray="3 3"'))
    out.append(text(query_x, 30, "query t", 13, INK, "middle", "bold"))
    out.append(text(right, y_seq + 38, "future", 12, FAINT, "end"))

    out += label(y_cmp + 8, "1 · compressed", "every l tokens, d apart,", "pooled by φ into one key", fill=CMP)
    peak = max(p)
    for i, weight in enumerate(p):
        x = LEFT + i * COMPRESS_STRIDE * CELL
        y = y_cmp - 6 + 17 * (i % 2)
        out.append(rect(x, y, COMPRESS_BLOCK * CELL - 1, 14, CMP, 0.12 + 0.88 * weight / peak))

    out += [
        text(LEFT - 14, y_imp + 6, "importance", 12, FAINT, "end"),
        text(LEFT - 14, y_imp + 21, "(eq. 9, 10)", 12, FAINT, "end"),
    ]
    top = max(imp)
    for j, score in enumerate(imp):
        x, h = LEFT + j * SELECT_BLOCK * CELL, 34 * score / top
        chosen = SLC if j in best else (FORCED if j in forced else "#cbd5e1")
        out.append(rect(x + 9, y_imp + 30 - h, SELECT_BLOCK * CELL - 19, h, chosen))
        if j in best:
            out.append(arrow(x + SELECT_BLOCK * CELL / 2, y_imp + 34, x + SELECT_BLOCK * CELL / 2, y_slc - 8, SLC))
    out.append(line(LEFT, y_imp + 30.6, LEFT + len(imp) * SELECT_BLOCK * CELL, y_imp + 30.6))

    out += label(y_slc + 10, "2 · selected", "the n best blocks of l'", "tokens, read in full", fill=SLC)

    def selected_colour(t):
        j = t // SELECT_BLOCK
        return None if t > QUERY else SLC if j in best else FORCED if j in forced else None

    out += tokens(y_slc, selected_colour)
    for j in range(N_TOKENS // SELECT_BLOCK):
        x = LEFT + j * SELECT_BLOCK * CELL
        out.append(rect(x - 2, y_slc - 3, SELECT_BLOCK * CELL - 1 + 2, 26, "none", stroke=LINE, radius=2.5))
    out.append(text(LEFT + 0.5 * SELECT_BLOCK * CELL, y_slc + 39, "first", 11.5, "#9a3412", "middle"))
    out.append(text(query_x - 7, y_slc + 39, "previous and own", 11.5, "#9a3412", "end"))
    out.append(
        text(
            LEFT + (min(best) + max(best) + 1) / 2 * SELECT_BLOCK * CELL,
            y_slc + 39,
            "highest importance",
            11.5,
            SLC,
            "middle",
        )
    )

    out += label(y_win + 10, "3 · window", "the last w tokens", fill=WIN)
    out += tokens(y_win, lambda t: WIN if QUERY - WINDOW < t <= QUERY else None)

    gate_x, sum_x = right + 62, right + 140
    middle = y_slc + 10
    for y, name, colour in ((y_cmp + 11, "cmp", CMP), (middle, "slc", SLC), (y_win + 10, "win", WIN)):
        out.append(arrow(right + 6, y, gate_x - 25, y, colour))
        out.append(f'<circle cx="{gate_x}" cy="{y}" r="21" fill="#ffffff" stroke="{colour}" stroke-width="1.8"/>')
        out.append(
            f'<text x="{gate_x}" y="{y + 5}" font-size="15" fill="{colour}" text-anchor="middle" font-style="italic">'
            f'g<tspan font-size="10.5" dy="4">{name}</tspan></text>'
        )
        if y == middle:
            end_x, end_y = sum_x - 19, y
        else:
            end_x, end_y = sum_x - 7, y + (1 if y < middle else -1) * (abs(middle - y) - 19)
        out.append(arrow(gate_x + 22, y, end_x, end_y, colour))
    out.append(f'<circle cx="{sum_x}" cy="{middle}" r="15" fill="#ffffff" stroke="{INK}" stroke-width="1.8"/>')
    out.append(text(sum_x, middle + 7, "+", 22, INK, "middle"))
    out.append(arrow(sum_x + 16, middle, sum_x + 30, middle, INK))
    out.append(
        f'<text x="{sum_x + 38}" y="{middle + 5}" font-size="16" fill="{INK}" font-style="italic">'
        'o<tspan font-size="11" dy="4">t</tspan></text>'
    )
    out.append(text(sum_x + 52, y_win + 48, "one gate per query head and branch", 12, FAINT, "end"))

    sizes = "Paper sizes: l = 32, d = 16, l' = 64, n = 16, w = 512."
    sizes += " At 65,536 tokens the last query reads 4,095 + 1,024 + 512 keys."
    out.append(text(LEFT, bottom + 8, sizes, 12, FAINT))
    body = "\n".join(out)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 24}" width="{WIDTH}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        "<title>What one query sees in Native Sparse Attention</title>\n"
        f'<rect width="{WIDTH}" height="{bottom + 24}" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("nsa.svg").write_text(draw(), encoding="utf-8")
