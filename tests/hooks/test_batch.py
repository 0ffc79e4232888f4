from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_accel.hooks import BatchTransform, batch_generator
from tests.hooks.common import (
    At,
    Data,
    Stop,
    Tiny,
    Validated,
    contract,
    fit,
    loader,
    make_trainer,
    none_at,
    save_at,
    stop_at,
)

RESUMED = "ignore:You're resuming from a checkpoint that ended before"


class Drawing(BatchTransform):
    """Keeps one draw of each batch, and adds it to the input if ``add`` is set."""

    contract = contract(touches=frozenset({"input"}))

    def __init__(self, name: str = "a", add: bool = False, seed: int | None = None) -> None:
        super().__init__(seed=seed, name=name)
        self.add = add
        self.draws: list[float] = []

    def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
        assert generator.device.type == "cpu"
        self.draws.append(torch.rand((), generator=generator, dtype=torch.float64).item())
        return [batch[0] + self.draws[-1], batch[1]] if self.add else batch


def draws(*arguments: Any, seed: int | None = 0, **options: Any) -> list[float]:
    callback = Drawing(seed=seed)
    fit(Tiny(), callback, *arguments, **options)
    return callback.draws


def test_the_generator_depends_on_each_argument_and_on_nothing_else() -> None:
    def draw(*arguments: Any) -> float:
        return torch.rand((), generator=batch_generator(*arguments), dtype=torch.float64).item()

    torch.manual_seed(1)
    cases = [
        (0, 0, 0, "a"),
        (1, 0, 0, "a"),
        (0, 1, 0, "a"),
        (0, 0, 1, "a"),
        (0, 0, 0, "b"),
        (10, 0, 0, "a"),
        (1, 0, 10, "a"),
    ]
    first = [draw(*case) for case in cases]
    torch.manual_seed(2)
    assert first == [draw(*case) for case in cases]
    assert len(set(first)) == len(cases)


def test_draws_of_consecutive_batches_are_independent_and_uniform() -> None:
    values = torch.tensor(
        [torch.rand((), generator=batch_generator(0, 0, n, "a"), dtype=torch.float64).item() for n in range(2000)]
    )
    assert abs(values.mean() - 0.5) < 0.03
    assert abs(values.var() - 1 / 12) < 0.01
    assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 0.06


def test_seeds_of_64_bits() -> None:
    for seed in (2**63, 2**64 - 1):
        assert isinstance(batch_generator(seed, 0, 0, "a"), torch.Generator)


def test_each_batch_of_a_fit_has_its_own_draw_and_a_second_run_repeats_them() -> None:
    first = draws(max_epochs=2)
    assert len(set(first)) == 10
    assert first == draws(max_epochs=2)
    assert first != draws(max_epochs=2, seed=1)
    expected = [batch_generator(0, 0, n, Drawing().state_key) for n in range(10)]
    assert first == [torch.rand((), generator=generator, dtype=torch.float64).item() for generator in expected]


def test_two_callbacks_draw_independently_and_act_in_turn() -> None:
    a, b = Drawing("a", add=True, seed=0), Drawing("b", add=True, seed=0)
    module = Tiny()
    fit(module, a, b)
    assert not set(a.draws) & set(b.draws)
    x = next(iter(loader()))[0]
    assert torch.allclose(module.seen[0], x + a.draws[0] + b.draws[0])


def test_validation_and_the_number_of_its_batches_change_nothing() -> None:
    def run(**options: Any) -> list[float]:
        callback = Drawing(seed=0)
        trainer = make_trainer(callback, max_epochs=2, **options)
        trainer.fit(Validated(), loader(), loader(3))
        return callback.draws

    assert run() == run(val_check_interval=2, num_sanity_val_steps=0) == draws(max_epochs=2)


def test_only_training_batches_are_transformed() -> None:
    module, callback = Validated(), Drawing(add=True, seed=0)
    trainer = make_trainer(callback)
    trainer.fit(module, loader(), loader(2))
    trainer.validate(module, loader(2), verbose=False)
    trainer.test(module, loader(2), verbose=False)
    trainer.predict(module, loader(2))
    assert len(callback.draws) == len(module.seen) == 5
    plain = [batch[0] for batch in loader(2)]
    assert len(module.evaluated) == 10  # sanity check, validation in and after the fit, test, prediction
    assert all(torch.equal(seen, plain[number % 2]) for number, seen in enumerate(module.evaluated))
    assert all(not torch.equal(seen, batch[0]) for seen, batch in zip(module.seen, loader(), strict=True))


def test_the_datamodules_hook_runs_first() -> None:
    data, module, callbacks = Data(), Tiny(), [Drawing("a", add=True, seed=0), Drawing("b", add=True, seed=0)]
    fit(module, *callbacks, data=data)
    x = next(iter(loader()))[0]
    assert torch.allclose(module.seen[0], x + 100 + callbacks[0].draws[0] + callbacks[1].draws[0])
    assert "on_after_batch_transfer" not in vars(data)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_its_own_batches_is_refused() -> None:
    class Fetching(Tiny):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match=r"Drawing .* `training_step\(self, batch, batch_idx\)`\."):
        fit(Fetching(), Drawing())


def test_batches_that_are_none_are_left_alone() -> None:
    callback = Drawing(seed=0)
    with pytest.warns(UserWarning, match="yielded None"):
        fit(Tiny(), callback, data=none_at(0, 2))
    every = draws()
    assert callback.draws == [every[1], every[3], every[4]]


def test_the_seed_is_the_runs_and_the_global_random_state_is_not_used() -> None:
    seed_everything(3, verbose=False)
    first = draws(seed=None, data=loader(shuffle=True))
    after = torch.get_rng_state()
    seed_everything(3, verbose=False)
    fit(Tiny(), data=loader(shuffle=True))
    assert torch.equal(torch.get_rng_state(), after)
    seed_everything(3, verbose=False)
    assert draws(seed=None) == first == draws(seed=3)
    seed_everything(4, verbose=False)
    assert draws(seed=None) != first


@pytest.mark.filterwarnings(RESUMED)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_resumed_run_draws_the_same(tmp_path: Path, hook: str, seed: int | None) -> None:
    path = tmp_path / "a.ckpt"
    torch.manual_seed(1)
    whole = Drawing(seed=seed)
    fit(Tiny(), whole, save_at(hook, path, on=0 if hook == "on_train_epoch_end" else 2), max_epochs=2)
    done = 5 if hook == "on_train_epoch_end" else 3
    torch.manual_seed(2)  # another process is seeded differently
    resumed = Drawing(seed=seed)
    fit(Tiny(), resumed, max_epochs=2, ckpt_path=path)
    assert resumed.draws == whole.draws[done:]
    assert torch.load(path, weights_only=True)["callbacks"][whole.state_key] == {"seed": 1 if seed is None else 5}
    # and once more from there, and afresh
    fit(Tiny(), resumed, max_epochs=2, ckpt_path=path)
    assert resumed.draws[len(whole.draws) - done :] == whole.draws[done:]
    fresh = Drawing(seed=seed)
    fit(Tiny(), fresh, max_epochs=2)
    assert (fresh.draws == whole.draws) == (seed is not None)


@pytest.mark.filterwarnings(RESUMED)
def test_a_run_resumed_from_an_exception_draws_the_same_for_the_batch_that_failed(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.ckpt", draws()

    class Saving(Drawing):
        def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
            batch = super().transform_batch(batch, generator)
            if len(self.draws) == 3:
                raise Stop
            return batch

    def save(trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(path)

    broken = Drawing(seed=0)
    with pytest.raises(Stop):
        fit(Tiny(), broken, stop_at("on_before_backward", on=2), save_at("on_exception", path))
    resumed = Drawing(seed=0)
    fit(Tiny(), resumed, ckpt_path=path)
    assert broken.draws[:2] + resumed.draws == whole


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Expected `seed` to be an int of at least 0, but got"):
        Drawing(seed=seed)


def test_neutral_settings_install_nothing() -> None:
    class Neutral(Drawing):
        is_neutral = True

    seen: list[bool] = []
    callback = Neutral(seed=0)
    note = At("on_train_start", lambda _, module: seen.append("on_after_batch_transfer" in vars(module)))
    fit(Tiny(), callback, note)
    assert seen == [False]
    assert callback.draws == []
    assert callback.state_dict() == {}
