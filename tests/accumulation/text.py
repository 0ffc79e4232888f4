"""Sentences of unequal lengths, a language model over them, plain steps on big batches, and a fit beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel import GradientAccumulation
from tests.hooks.common import fit

WORDS, LENGTH, IGNORED = 7, 6, -100
Batch = dict[str, Any]


def make_batches(sizes: Iterable[int], seed: int = 0, lengths: list[int] | None = None) -> list[Batch]:
    """Batches of so many sentences of 1 to 6 tokens each; what comes after a sentence's end is ignored.

    Args:
        sizes: The number of sentences of each batch.
        seed: Of the tokens and the lengths.
        lengths: Of each batch the length of all its sentences, in place of random ones.
    """
    generator, batches = torch.Generator().manual_seed(seed), []
    for number, size in enumerate(sizes):
        tokens = torch.randint(0, WORDS, (size, LENGTH + 1), generator=generator)
        length = torch.randint(1, LENGTH + 1, (size, 1), generator=generator)
        if lengths is not None:
            length = torch.full((size, 1), lengths[number])
        mask = torch.arange(LENGTH) < length
        labels = tokens[:, 1:].masked_fill(~mask, IGNORED)
        batches.append({"inputs": {"ids": tokens[:, :-1], "attention_mask": mask.long()}, "labels": labels})
    return batches


def joined(batches: list[Batch]) -> Batch:
    """One big batch of several."""
    inputs = {key: torch.cat([batch["inputs"][key] for batch in batches]) for key in ("ids", "attention_mask")}
    return {"inputs": inputs, "labels": torch.cat([batch["labels"] for batch in batches])}


class _Stream(IterableDataset[Batch]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def loader(batches: list[Batch], *, stream: bool = False) -> DataLoader[Any]:
    """These batches, with a length or without."""
    return DataLoader(_Stream(batches) if stream else batches, batch_size=None)  # type: ignore[arg-type]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.5)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)


def one_cycle(module: Any) -> Any:
    optimizer = sgd(module)
    total = int(module.trainer.estimated_stepping_batches)
    return [optimizer], [{"scheduler": OneCycleLR(optimizer, max_lr=0.5, total_steps=total), "interval": "step"}]


class Text(LightningModule):
    """Predicts the next token; its loss is the mean over the tokens that count, or over the sentences."""

    def __init__(self, configure: Callable[[Any], Any] = sgd, over: str = "tokens") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embed = nn.Embedding(WORDS, 6)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, WORDS))
        self.configure = configure
        self.over = over

    def loss(self, batch: Batch) -> Tensor:
        scores = self.net(self.embed(batch["inputs"]["ids"])).transpose(1, 2)  # (B, WORDS, LENGTH)
        if self.over == "tokens":
            return nn.functional.cross_entropy(scores, batch["labels"], ignore_index=IGNORED)
        losses = nn.functional.cross_entropy(scores, batch["labels"], ignore_index=IGNORED, reduction="none")
        return losses.sum(1).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def by_hand(
    windows: list[list[Batch]],
    module: Text | None = None,
    clip: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Plain steps, each on one big batch of a window: the weights after them, and the gradient of each, unclipped."""
    module = module or Text()
    optimizer, gradients = module.configure(module), []
    for window in windows:
        optimizer.zero_grad()
        module.loss(joined(window)).backward()
        gradients.append(gradient(module))
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return weights(module), gradients


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()])


class Steps(Callback):
    """The gradient of each optimizer step, and the number of batches, from 1, that were done then."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.ends: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append(gradient(pl_module))
        self.ends.append(trainer.fit_loop.total_batch_idx + 1)


# ---------------------------------------------------------------------------------------- one process

BATCHES = make_batches([2, 3, 1, 4, 2, 1, 3])  # sentences, of 1 to 6 tokens
TOKENS = [int((batch["labels"] != -100).sum()) for batch in BATCHES]


def by_tokens(factor: Any = 3, **arguments: Any) -> GradientAccumulation:
    return GradientAccumulation(factor, weight_by="tokens", count_key="labels", **arguments)


def up_to(target: int, unit: str = "tokens", **arguments: Any) -> GradientAccumulation:
    options = {"count_key": "labels", "weight_by": unit, **arguments}
    return GradientAccumulation(target_batch_size=target, unit=unit, **options)  # type: ignore[arg-type]


def cut(lengths: list[int], batches: list[Batch] = BATCHES) -> list[list[Batch]]:
    """The batches of each window, where windows have so many; over as many epochs as that needs."""
    windows, begin = [], 0
    for length in lengths:
        windows.append(batches[begin : begin + length])
        begin = (begin + length) % len(batches)
    return windows


def check(
    callback: Callback, lengths: list[int], *, stream: bool = False, over: str = "tokens", **options: Any
) -> None:
    """Fit, and compare each step's gradient and the weights with those of plain steps on big batches."""
    module, steps = Text(over=over), Steps()
    trainer = fit(module, callback, steps, data=loader(BATCHES, stream=stream), **options)
    final, gradients = by_hand(cut(lengths), Text(over=over))
    assert steps.ends == [sum(lengths[: number + 1]) for number in range(len(lengths))]
    torch.testing.assert_close(steps.gradients, gradients, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights(module), final, rtol=1e-5, atol=1e-6)
    assert trainer.global_step == len(lengths)
    assert trainer.accumulate_grad_batches == 1


def windows_of(target: int) -> list[int]:
    """How many batches it takes, one after another, to have so many tokens."""
    lengths, left = [], 0
    for tokens in TOKENS:
        if left <= 0:
            lengths, left = [*lengths, 0], target
        lengths[-1] += 1
        left -= tokens
    return lengths


def ours(said: pytest.WarningsRecorder) -> list[str]:
    """What was said, but for Lightning's hints and deprecations."""
    return [str(warning.message) for warning in said if warning.category is UserWarning]
