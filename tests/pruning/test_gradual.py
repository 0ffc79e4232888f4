"""GradualPruning in real fits of a tiny module."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.errors import NoEffectWarning
from lightning_accel.hooks import moment
from lightning_accel.pruning import gradual
from lightning_accel.pruning.gradual import GradualPruning
from lightning_accel.schedules import Duration, value_at
from tests.conftest import WEIGHTS_ONLY

BATCHES = 10  # an epoch


class Tiny(LightningModule):
    """A convolution and two linear layers; 40 + 128 + 24 prunable weights."""

    def __init__(self, optimizer="AdamW", **options):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 5)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(32, 4)
        self.output = nn.Linear(4, 6)
        self.optimizer, self.options = optimizer, {"lr": 0.02, **options}

    def forward(self, x):
        return self.output(self.hidden(torch.relu(self.norm(self.conv(x[:, None]))).flatten(1)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)


class Resumable(DataLoader):
    """A loader that knows how many batches of the epoch it has handed out."""

    handed = start = 0

    def __iter__(self):
        start, self.start = self.start % BATCHES, 0
        for self.handed, batch in enumerate(super().__iter__(), start=1):
            if self.handed > start:
                yield batch

    def state_dict(self):
        return {"handed": self.handed}

    def load_state_dict(self, state):
        self.start = state["handed"]


def loader():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCHES * 4, 8, generator=generator)
    return Resumable(TensorDataset(x, torch.randint(0, 6, (BATCHES * 4,), generator=generator)), batch_size=4)


def fit(module, *callbacks, ckpt_path=None, epochs=3, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path, **WEIGHTS_ONLY)
    return trainer


def weights(module):
    return [module.conv.weight, module.hidden.weight, module.output.weight]


def zeros(module):
    return sum(int((weight == 0).sum()) for weight in weights(module))


def everything(trainer):
    """Weights, optimizer state and whatever else a checkpoint has, as one flat list."""
    optimizers = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    tensors = [*trainer.lightning_module.state_dict().values()]
    tensors += [v for state in optimizers for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [tensor.clone() for tensor in tensors]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Trace(Callback):
    """Notes the number of zeros after every batch."""

    def __init__(self):
        self.zeros = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.zeros.append(zeros(pl_module))


@pytest.mark.parametrize("schedule", ["cubic", "linear", "cosine", "polynomial", "step", "constant"])
def test_sparsity_follows_the_schedule_exactly(schedule):
    trace = Trace()
    fit(Tiny(), GradualPruning(0.8, start=6, end=25, every=4, schedule=schedule), trace)
    expected, current = [], 0
    for step in range(1, 31):
        if step >= 25:
            current = round(0.8 * 192)
        elif step >= 6 and (step - 6) % 4 == 0:
            current = round(value_at(schedule, (step - 6) / 19, 0.0, 0.8) * 192)
        expected.append(current)
    assert trace.zeros == expected


@pytest.mark.parametrize(
    ("start", "end", "every", "first", "last"),
    [
        ("0.2fit", "0.7fit", "3step", 9, 21),
        ("1epoch", "2epoch", "0.2epoch", 12, 20),
        ("5batch", "0.5fit", "1batch", 6, 15),
        ("0step", "1fit", "0.1fit", 3, 30),
        ("12step", "12step", "1step", 12, 12),
    ],
)
def test_units(start, end, every, first, last):
    trace = Trace()
    fit(Tiny(), GradualPruning(0.9, start, end, every, schedule="linear"), trace)
    assert next(step for step, count in enumerate(trace.zeros, start=1) if count) == first
    assert trace.zeros.index(round(0.9 * 192)) + 1 == last


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.5}),
        ("Adam", {"weight_decay": 0.5}),
        ("Adagrad", {}),
        ("RMSprop", {"momentum": 0.9}),
        ("NAdam", {}),
    ],
)
def test_pruned_weights_stay_zero_with_their_momentum(optimizer, options):
    class Check(Callback):
        checked = 0

        def on_train_batch_end(self, trainer, pl_module, *_):
            pruned = pruning._masks and [mask == 0 for mask in pruning._masks]
            for weight, gone in zip(weights(pl_module), pruned, strict=bool(pruned)):
                state = trainer.optimizers[0].state[weight].items()
                state = [
                    v for k, v in state if v.shape == weight.shape and k not in ("exp_avg_sq", "square_avg", "sum")
                ]
                for tensor in (weight, *state):
                    self.checked += int(gone.sum())
                    assert not tensor[gone].any()

    pruning = GradualPruning(0.7, start=0, end="0.8fit", every=1)
    check = Check()
    module = Tiny(optimizer, **options)
    fit(module, pruning, check, gradient_clip_val=0.5)
    assert check.checked > 1000 and zeros(module) == round(0.7 * 192)
    moved = [v for w in weights(module) for v in module.trainer.optimizers[0].state[w].values() if v.shape == w.shape]
    assert any(v.any() for v in moved), "what is kept goes on learning"


def test_the_post_step_mask_holds_whatever_the_optimizer_does():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1.0)
            return loss

    class Module(Tiny):
        def configure_optimizers(self):
            return Noisy(self.parameters(), lr=0.01)

    module = Module()
    fit(module, GradualPruning(0.7, start=0, end=10, every=1))
    assert zeros(module) == round(0.7 * 192)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_does_not_see_pruned_weights(clip):
    norms = []

    class Module(Tiny):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pruned = [mask == 0 for mask in pruning._masks]
            if pruned:
                assert not any(w.grad[gone].any() for w, gone in zip(weights(self), pruned, strict=True))
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            norms.append(torch.stack([w.grad.norm() for w in self.parameters()]).norm())

    pruning = GradualPruning(0.9, start=0, end=5, every=1)
    fit(Module("SGD"), pruning, gradient_clip_val=0.01, gradient_clip_algorithm=clip)
    if clip == "norm":
        assert torch.stack(norms).sub(0.01).abs().max() < 1e-6, "all of the norm goes to what is kept"


def test_weights_change_only_after_an_optimizer_step():
    trace = Trace()
    fit(Tiny(), GradualPruning(0.8, "3batch", "21batch", "1batch", schedule="linear"), trace, accumulate_grad_batches=2)
    changed = [batch for batch in range(1, 30) if trace.zeros[batch] != trace.zeros[batch - 1]]
    assert len(changed) > 8 and all((batch + 1) % 2 == 0 for batch in changed)


def test_scopes():
    fit(one := Tiny(), GradualPruning(0.5, 0, 10, 1, scope="layer"))
    assert [int((w == 0).sum()) for w in weights(one)] == [20, 64, 12]
    fit(other := Tiny(), GradualPruning(0.5, 0, 10, 1, scope="global"))
    assert zeros(other) == 96 and [int((w == 0).sum()) for w in weights(other)] != [20, 64, 12]


def test_many_updates_do_not_compound():
    trace = Trace()
    fit(Tiny(), GradualPruning(0.5, 0, 5, 1, schedule="constant"), trace)
    assert set(trace.zeros) == {96}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_amount_0_is_the_plain_run(optimizer):
    class Check(Callback):
        def on_train_batch_end(self, trainer, *_):
            assert not trainer.optimizers[0]._optimizer_step_post_hooks, "nothing is installed"

    runs = []
    for callbacks in ([], [GradualPruning(0.0), Check()]):
        torch.manual_seed(1)
        trainer = fit(Tiny(optimizer), *callbacks)
        runs.append(everything(trainer))
    assert_same(*runs)


def stop_at(step):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == step:
                raise KeyboardInterrupt

    return Stop()


class Save(Callback):
    """Saves after a batch, before (as it comes first) or after pruning acted; after an epoch, at the epoch's end."""

    def __init__(self, batch, path="mid.ckpt"):
        self.batch, self.path = batch, path

    def save(self, trainer):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.batch % BATCHES:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batch", [4, 7, 10, 13, 16, 20, 26])
def test_resume_is_exact(batch, accumulate, first):
    def pruning():
        return GradualPruning(0.8, "4batch", "0.6fit", "3batch")

    torch.manual_seed(1)
    save, trace, one = Save(batch), Trace(), pruning()
    whole = fit(Tiny(), *([save, one] if first else [one, save]), trace, accumulate_grad_batches=accumulate)
    if accumulate == 2 and batch % 2 and batch % BATCHES:
        return  # the gradients of a window that was cut are not this callback's to restore
    torch.manual_seed(2)
    again, other = Trace(), pruning()
    resumed = fit(Tiny(), other, again, accumulate_grad_batches=accumulate, ckpt_path="mid.ckpt")
    assert_same(everything(whole), everything(resumed))
    assert trace.zeros[batch:] == again.zeros
    assert_same(one._masks, other._masks)
    assert one._num_pruned == other._num_pruned
    assert one.report() == other.report()


def test_checkpoint_is_a_plain_sparse_module():
    module = Tiny()
    plain = set(module.state_dict())
    checkpoints = ModelCheckpoint(dirpath=".", filename="last", save_top_k=1)
    fit(module, GradualPruning(0.8, 0, "1fit", 1), checkpoints, enable_checkpointing=True)
    checkpoint = torch.load("last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == plain
    fresh = Tiny()
    fresh.load_state_dict(checkpoint["state_dict"])
    assert zeros(fresh) == round(0.8 * 192), "the last checkpoint of a fit that prunes to its end is pruned to the full"
    (state,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("GradualPruning"))
    assert sum(mask.numel() for mask in state["masks"].values()) == 192 // 8


class TwoOptimizers(Tiny):
    """Manual optimization: one optimizer for the convolution, one for the rest."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        rest = [*self.norm.parameters(), *self.hidden.parameters(), *self.output.parameters()]
        return [
            torch.optim.AdamW(self.conv.parameters(), lr=0.02),
            torch.optim.SGD(rest, lr=0.02, momentum=0.9),
        ]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_manual_optimization_with_two_optimizers():
    module, trace = TwoOptimizers(), Trace()
    trainer = fit(module, GradualPruning(0.75, start=0, end=40, every=2), trace)
    assert trainer.global_step == 60
    assert trace.zeros == sorted(trace.zeros) and trace.zeros[19] == trace.zeros[-1] == 144
    for weight in weights(module):
        for optimizer in trainer.optimizers:
            for name, state in optimizer.state.get(weight, {}).items():
                assert name not in ("exp_avg", "momentum_buffer") or not state[weight == 0].any()


def test_undo_and_a_second_fit():
    module, pruning = Tiny(), GradualPruning(0.8, 0, "0.5fit", 1)
    hooks = vars(module).keys()
    first = fit(module, pruning)
    assert not first.optimizers[0]._optimizer_step_post_hooks and vars(module).keys() == hooks
    fresh = Tiny()
    fit(fresh, pruning)
    assert zeros(fresh) == round(0.8 * 192)


def test_a_fit_that_goes_on_is_like_one_fit():
    module, pruning, trace = Tiny(), GradualPruning(0.8, 0, 45, 4), Trace()
    with pytest.warns(UserWarning, match="the fit ended before `end`"):
        trainer = fit(module, pruning, trace)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader())
    whole = Trace()
    fit(Tiny(), GradualPruning(0.8, 0, 45, 4), whole, epochs=5)
    assert trace.zeros == whole.zeros and len(trace.zeros) == 50


def test_an_exception_undoes_the_hooks():
    module = Tiny()
    with pytest.raises(SystemExit):
        fit(module, GradualPruning(0.8, 0, 20, 1), stop_at(8))
    assert not module.trainer.optimizers or not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_a_fit_that_ends_before_the_end():
    with pytest.warns(UserWarning, match=r"reached a sparsity of 0\.\d+ of 0\.9: .* `end` \('50step'\)"):
        fit(Tiny(), GradualPruning(0.9, 0, 50, 1))


def test_a_timed_fit_prunes_to_its_end():
    module = Tiny()
    fit(module, GradualPruning(0.9, "0fit", "1fit", "0.1fit"), epochs=-1, max_time={"seconds": 1})
    assert zeros(module) == round(0.9 * 192)


def test_a_fit_that_a_clock_ended_after_the_last_batch_prunes_to_its_end(monkeypatch):
    class Ended(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            monkeypatch.setattr(gradual, "moment", lambda trainer: dataclasses.replace(moment(trainer), fit=1.0))

    monkeypatch.setattr(gradual, "moment", lambda trainer: dataclasses.replace(moment(trainer), fit=0.99))
    fit(module := Tiny(), GradualPruning(0.9, "0fit", "1fit", "0.1fit"), Ended(), epochs=1)
    assert zeros(module) == round(0.9 * 192)


def test_nothing_to_prune_warns():
    class Flat(Tiny):
        def __init__(self):
            super().__init__()
            for layer in (self.conv, self.hidden, self.output):
                layer.weight.requires_grad_(False)

    with pytest.warns(NoEffectWarning, match=r"no trainable weights to prune \(3 that match are frozen\)"):
        fit(module := Flat(), GradualPruning())
    assert zeros(module) == 0


def test_frozen_weights_are_reported(capsys):
    module = Tiny()
    module.hidden.weight.requires_grad_(False)
    pruning = GradualPruning(0.5, 0, 10, 1)
    fit(module, pruning)
    assert {row.name: (row.frozen, row.sparsity > 0) for row in pruning.report()} == {
        "conv.weight": (False, True), "output.weight": (False, True), "hidden.weight": (True, False),
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "GradualPruning: sparsity 0.5000" in printed and "frozen, left alone" in printed and "32 of 64" in printed


def test_patterns(capsys):
    fit(module := Tiny(), GradualPruning(0.5, 0, 10, 1, include=["hidden"], exclude=["bias"]))
    assert int((module.hidden.weight == 0).sum()) == 64 == zeros(module)
    with pytest.raises(ValueError, match=r"`include` .* got 'heads', which matches none of: conv\.weight"):
        fit(Tiny(), GradualPruning(include=["heads"]))
    with pytest.warns(UserWarning, match=r"no parameter matches `exclude` \['heads'\]"):
        fit(Tiny(), GradualPruning(exclude=["heads"]))


def test_sparse_gradients_of_an_embedding():
    class Words(LightningModule):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.embedding(batch[1]).square().sum()

        def configure_optimizers(self):
            return torch.optim.SparseAdam(self.parameters(), lr=0.01)

    class Check(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weight = pl_module.embedding.weight
            if pruning._masks and trainer.global_step > 10:
                assert weight.grad.is_sparse and not weight.grad.to_dense()[pruning._masks[0] == 0].any()

    pruning = GradualPruning(0.5, 0, 10, 1, include=["embedding"])
    fit(module := Words(), pruning, Check())
    assert int((module.embedding.weight == 0).sum()) == 20


def test_bfloat16_weights():
    module = Tiny("SGD")
    fit(module, GradualPruning(0.8, 0, 20, 1), precision="bf16-true")
    assert module.hidden.weight.dtype == torch.bfloat16 and zeros(module) == round(0.8 * 192)


def test_compiled_module():
    module = Tiny()
    compiled = torch.compile(module, backend="eager")
    fit(compiled, pruning := GradualPruning(0.8, 0, 20, 1))
    assert zeros(module) == round(0.8 * 192)
    assert [row.name for row in pruning.report()] == ["conv.weight", "hidden.weight", "output.weight"]


def test_a_checkpoint_of_another_module():
    fit(Tiny(), GradualPruning(0.8, 0, 20, 1), Save(15, "old.ckpt"))

    class Renamed(Tiny):
        def __init__(self):
            super().__init__()
            self.head, self.output = self.output, nn.Identity()
            self.strict_loading = False

        def forward(self, x):
            return self.head(super().forward(x))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), **self.options)

    with pytest.raises(ValueError, match=r"the module has no \['output\.weight'\]"):
        fit(Renamed(), GradualPruning(0.8, 0, 20, 1), ckpt_path="old.ckpt")


def test_another_pruner_is_refused():
    with pytest.raises(MisconfigurationException, match="can't work with ModelPruning: both would prune"):
        fit(Tiny(), GradualPruning(), ModelPruning("l1_unstructured"))


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharding_strategies_are_refused_with_a_way_out(name):
    import lightning.pytorch.strategies as strategies

    assert hasattr(strategies, name)
    assert "strategy='ddp'" in GradualPruning.contract.refuses[name]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"amount": 1.3}, ValueError, r"^Expected `amount` to be in \[0, 1\], but got 1\.3\.$"),
        ({"amount": "half"}, TypeError, "^Expected `amount` to be a number"),
        ({"start": "2fit"}, ValueError, r"^Expected `start` to be in \[0, 1\] of the fit, but got '2fit'\.$"),
        ({"end": "soon"}, ValueError, "^Expected `end` to be a duration"),
        ({"every": 0}, ValueError, r"^Expected `every` to be longer than 0, but got 0\.$"),
        (
            {"start": "0.8fit"},
            ValueError,
            r"^Expected `end` to be at or after `start` \('0\.8fit'\), but got '0\.7fit'\.$",
        ),
        ({"schedule": "one_cycle"}, ValueError, "^Expected `schedule` to be one of 'cubic'"),
        ({"scope": "row"}, ValueError, r"^Expected `scope` to be one of 'global', 'layer', but got 'row'\.$"),
        ({"include": "conv"}, TypeError, "^Expected `include` to be a list of regular expressions"),
        ({"exclude": ["("]}, ValueError, "^Expected `exclude` to hold valid regular expressions"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        GradualPruning(**arguments)


def test_state_key_and_arguments():
    include = ["conv"]
    pruning = GradualPruning(start=Duration(5, "step"), end="2epoch", include=include)
    include.append("hidden")
    assert pruning.include == ["conv"]
    assert "'start': '5step', 'end': '2epoch', 'every': '50step'" in pruning.state_key
    assert pruning.state_key != GradualPruning().state_key
    assert copy.deepcopy(pruning).state_key == pruning.state_key


def test_two_of_them_prune_different_layers():
    module = Tiny()
    fit(
        module,
        GradualPruning(0.5, 0, 10, 1, include=["conv.weight"]),
        GradualPruning(0.75, 0, 10, 1, include=["hidden.w"]),
    )
    assert [int((weight == 0).sum()) for weight in weights(module)] == [20, 96, 0]


def test_an_endless_fit_is_a_clear_error():
    with pytest.raises(ValueError, match=r"place '0\.7fit' in it, but this fit has none"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Tiny(), GradualPruning(), epochs=-1)


@pytest.mark.parametrize("backend", ["generic", "bitsandbytes"])
def test_with_8_bit_moments(backend):
    from lightning_accel.optimizers.low_bit import LowBitOptimizer

    def callbacks():
        return [GradualPruning(0.8, 2, 18, 2), LowBitOptimizer(backend=backend, min_size=1)]

    trace = Trace()
    whole = fit(Tiny(), *callbacks(), Save(13), trace)
    assert trace.zeros[-1] == round(0.8 * 192) and trace.zeros == sorted(trace.zeros)
    resumed = fit(Tiny(), *callbacks(), ckpt_path="mid.ckpt")
    assert_same(everything(whole), everything(resumed))


def dense_after(module, callback):
    """How many of the weights that are pruned are not zero."""
    masks = zip(callback._weights.values(), callback._masks, strict=False)  # none before the first update
    return sum(int(weight[mask == 0].count_nonzero()) for weight, mask in masks)


def fit_checked(module, *callbacks, **options):
    """Fit and count, after every batch, the pruned weights that are not zero and the weights that were masked again."""
    pruning = GradualPruning(0.8, start=2, end=8, every=2)
    dense, again = [], []

    class Check(Callback):
        def on_train_batch_end(self, trainer, *_):
            dense.append(dense_after(module, pruning))

    original = gradual.apply_masks_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gradual, "apply_masks_", lambda tensors, masks: (again.append(list(tensors)), original(tensors, masks))
        )
        fit(module, pruning, Check(), *callbacks, **options)
    weights = set(map(id, module.parameters()))
    return dense, sum(id(tensors[0]) in weights for tensors in again if tensors)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("Adam", {"weight_decay": 0.1, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.1}),
        ("NAdam", {"weight_decay": 0.1}),
        ("RAdam", {"weight_decay": 0.1}),
        ("Adamax", {"weight_decay": 0.1}),
        ("Adagrad", {"weight_decay": 0.1}),
        ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ],
)
def test_a_step_that_keeps_zeros_reads_the_masks_once(optimizer, options):
    dense, again = fit_checked(Tiny(optimizer, **options), gradient_clip_val=0.5)
    assert len(dense) > 15 and not any(dense)
    assert again <= 5  # the updates and the end


@pytest.mark.parametrize("how", ["module hook", "callback hook", "raw step", "other optimizer"])
def test_weights_are_masked_again_where_a_step_may_change_them(how):
    class Noisy(Tiny):
        def on_before_optimizer_step(self, optimizer):
            add_noise(self)

    class Noise(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            add_noise(pl_module)

    class Raw(Tiny):
        def __init__(self):
            super().__init__("SGD", momentum=0.9)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=batch_idx % 3 > 0)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    modules = {"module hook": Noisy, "raw step": Raw, "other optimizer": lambda: Tiny("ASGD", lambd=0.1)}
    dense, again = fit_checked(modules.get(how, Tiny)(), *([Noise()] if how == "callback hook" else []))
    assert len(dense) > 15 and not any(dense)
    assert again > 10


def add_noise(module):
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(0.1)
