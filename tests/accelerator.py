"""Which device the tests that train are for: the CPU, or what ``TEST_ACCELERATOR`` names."""

from __future__ import annotations

import os

import torch

__all__ = ["ACCELERATOR"]

ACCELERATOR = os.environ.get("TEST_ACCELERATOR", "cpu")
if ACCELERATOR == "cuda":  # or two runs of a convolution differ
    torch.backends.cudnn.deterministic = True
