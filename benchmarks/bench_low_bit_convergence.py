"""Every code of LowBitOptimizer against 32 bits on two real tasks: what is learned in the same steps.

python benchmarks/bench_low_bit_convergence.py [--quick] [--seeds 3] [--task "language model"]

The example projects' unedited modules and data: digits or clothes by a small convolutional network, and film reviews
by a small GPT. A seed decides the initial weights and the order of the data, the same for all; what is found is
compared seed by seed. Every matrix has low-bit state, embeddings as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from _timing import environment, show  # first: it sets the threads before torch is imported

# isort: split
from lightning.pytorch import LightningModule, Trainer, seed_everything

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from examples.image_classification.data import ImageData  # noqa: E402  # a folder beside this one
from examples.image_classification.model import ImageClassifier  # noqa: E402
from examples.language_model.data import TextData  # noqa: E402
from examples.language_model.model import GPT  # noqa: E402
from lightning_accel import LowBitOptimizer  # noqa: E402
from lightning_accel.report.statistics import compute_verdict, difference, mean  # noqa: E402

SIDES: dict[str, dict[str, Any]] = {
    "32 bits": {},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "fp8": {"bits": "fp8"},
    "bf16": {"bits": "bf16"},
    "bfloat16 parameters, 32 bits": {"precision": "bf16-true"},
    "bfloat16 parameters, 8 bits": {"precision": "bf16-true", "bits": 8},
    "the same, stochastic rounding": {"precision": "bf16-true", "bits": 8, "stochastic_rounding": True},
}
TASKS: dict[str, dict[str, Any]] = {
    "image classification": {"module": ImageClassifier, "data": ImageData, "metric": "val_loss", "steps": 252},
    "language model": {
        "module": partial(GPT, lr=5e-3),
        "data": partial(TextData, batch_size=16, length=32),
        "metric": "val_bits_per_byte",
        "steps": 1200,
    },
}


def fit(task: dict[str, Any], side: dict[str, Any], seed: int, steps: int) -> float:
    """The metric on held-out data after the last step."""
    options = dict(side)
    precision = options.pop("precision", "32-true")
    callbacks = [LowBitOptimizer(min_size=256, keep_embeddings=False, **options)] if options else []
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        precision=precision,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=50,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        num_sanity_val_steps=0,
    )
    module: LightningModule = task["module"]()
    trainer.fit(module, datamodule=task["data"]())
    return float(trainer.callback_metrics[task["metric"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 seed of 20 steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=list(TASKS), help="one of them alone")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{environment()}\n")
    print("| task | | on held-out data, lower is better | against 32 bits, by seed | |")
    print("| --- | --- | ---: | ---: | --- |")
    for name in [arguments.task] if arguments.task else list(TASKS):
        task = TASKS[name]
        steps = 20 if arguments.quick else task["steps"]
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for seed in range(seeds):
            for side, options in SIDES.items():
                with contextlib.redirect_stdout(io.StringIO()):  # the plan
                    found[side].append(fit(task, options, seed, steps))
        for side, values in found.items():
            change = None if side == "32 bits" else difference(found["32 bits"], values)
            verdict = compute_verdict(change, 0, "lower") if change else ""
            print(f"| {name} | {side} | {show(mean(values), '', 4)} | {show(change, '+', 4)} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
