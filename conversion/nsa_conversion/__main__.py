# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m nsa_conversion` is the `nsa` command; launchers such as `accelerate launch -m` need this form."""

import sys

from nsa_conversion.cli import main

if __name__ == "__main__":
    sys.exit(main())
