# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Convert full-attention checkpoints to Native Sparse Attention, fine-tune, evaluate and run them.

Everything is imported on first use: `import nsa_conversion` loads neither torch nor transformers.
"""

import importlib
import sys
import types

# public name -> module that defines it
_EXPORTS = {
    "convert": "convert",
    "ConversionReport": "convert",
    "plan": "plan",
    "Plan": "plan",
    "verify": "verify",
    "VerifyReport": "verify",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "generate": "generate",
    "serve": "serve",
    "inspect_text": "inspect",
    "push": "hub",
    "load_model": "sources",
    "scale_rope": "rope",
    "smollm2_gguf": "sources",
    "NSAError": "errors",
}

__all__ = list(_EXPORTS)


class _Package(types.ModuleType):
    """Keeps `nsa_conversion.convert` the function: importing a submodule would bind the module to that name."""

    def __setattr__(self, name, value):
        if name in _EXPORTS and isinstance(value, types.ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
