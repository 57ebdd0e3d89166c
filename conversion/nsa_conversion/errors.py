# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The one exception class for a user's mistake, and how its texts list things."""

__all__ = ["NSAError", "listing"]


class NSAError(ValueError):
    """A request that cannot be carried out; the text names what was given, what is required and what to do."""


def listing(names, limit=12) -> str:
    """Join names with commas; beyond `limit` of them only their number is given."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
