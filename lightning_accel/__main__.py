"""``python -m lightning_accel`` is ``lightning-accel``."""

from __future__ import annotations

import sys

from lightning_accel.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
