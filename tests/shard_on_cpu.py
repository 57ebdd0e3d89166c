# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""`nsa` with FSDP or DeepSpeed on CPUs, where accelerate would leave both out: a script for `accelerate launch`.

Needs ACCELERATE_TORCH_DEVICE=cpu in the environment. Everything behind the choice of device is as on GPUs.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from nsa_conversion.cli import main

if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
    torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # a thread of a library that aborts while Python shuts down would count as a failed run
