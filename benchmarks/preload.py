"""What the server that processes are forked from has imported."""

import os
import sys

# BackPACK and curvlinops bring a torchvision that need not fit a CPU-only torch; Transformers would import it and fail.
sys.modules["torchvision"] = None
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch.func  # noqa: E402 (what is above comes first)
import torch.utils.data  # noqa: E402, F401
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402, F401

import fisherfunc  # noqa: E402, F401
