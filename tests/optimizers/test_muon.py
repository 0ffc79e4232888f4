from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_accel import FusedOptimizer, GradualPruning, Muon
from lightning_accel.errors import NoEffectWarning
from lightning_accel.optimizers.muon import hidden_matrices, use_muon_
from tests.conformance.compare import assert_equal
from tests.conformance.toy import Digits, make_trainer, run, train_loader
from tests.optimizers.toy import MAKE, model, train, weights

ADAMW: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.05}


def split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = list(hidden_matrices(module).values())
    return matrices, [p for p in module.parameters() if all(p is not m for m in matrices)]


class Pair(Optimizer):
    """What it must equal: two optimizers, stepped one after the other."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = optimizers[0].param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, closure: Any = None) -> Any:
        for optimizer in self.optimizers:
            optimizer.step()


def pair(module: nn.Module, **options: Any) -> Pair:
    matrices, rest = split(module)
    muon: Any = torch.optim.Muon(matrices, **{**ADAMW, "adjust_lr_fn": "match_rms_adamw", **options})
    return Pair(torch.optim.AdamW(rest, **ADAMW), muon)


def test_bit_for_bit_torchs_muon_beside_adamw() -> None:
    ours, theirs = model(), model()
    optimizer = torch.optim.AdamW(ours.parameters(), **ADAMW)
    assert use_muon_(optimizer, split(ours)[0], adjust_lr_fn="match_rms_adamw") is optimizer
    assert len(split(ours)[0]) > 0
    assert train(ours, optimizer, 20) == train(theirs, pair(theirs), 20)
    assert_equal(weights(ours), weights(theirs), "weights")
    plain = model()
    assert train(plain, torch.optim.AdamW(plain.parameters(), **ADAMW), 20) != train(model(), optimizer, 1)


def test_rates_and_decay_are_those_of_each_group_at_each_step() -> None:
    ours, theirs = model(), model()
    (matrix, *_), rest = split(ours)
    groups = [{"params": [matrix], "lr": 1e-2, "weight_decay": 0.3}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    use_muon_(optimizer, [matrix], adjust_lr_fn="match_rms_adamw")
    schedule = LambdaLR(optimizer, [lambda n: 1 / (1 + n), lambda n: 1.0])
    (matrix2, *_), rest2 = split(theirs)
    muon: Any = torch.optim.Muon([matrix2], lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    other = LambdaLR(muon, lambda n: 1 / (1 + n))
    both = Pair(torch.optim.AdamW(rest2, **ADAMW), muon)
    for _ in range(3):
        assert train(ours, optimizer, 1) == train(theirs, both, 1)
        schedule.step()
        other.step()
    assert_equal(weights(ours), weights(theirs), "weights")


def test_own_decay_and_options() -> None:
    ours, theirs = model(), model()
    options: dict[str, Any] = {"weight_decay": 0.5, "momentum": 0.8, "nesterov": False, "ns_steps": 3}
    optimizer = torch.optim.AdamW(ours.parameters(), **ADAMW)
    use_muon_(optimizer, split(ours)[0], adjust_lr_fn="original", **options)
    train(ours, optimizer, 3)
    train(theirs, pair(theirs, adjust_lr_fn="original", **options), 3)
    assert_equal(weights(ours), weights(theirs), "weights")


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad"])
def test_beside_any_optimizer(name: str) -> None:
    module = model()
    matrices = split(module)[0]
    optimizer = MAKE[name](module.parameters())
    use_muon_(optimizer, matrices)
    losses = train(module, optimizer, 5)
    assert losses[-1] < losses[0]
    for parameter in matrices:
        assert list(optimizer.state[parameter]) == ["momentum_buffer"]


def test_half_of_adams_state() -> None:
    def size(optimizer: Optimizer, matrices: list[nn.Parameter]) -> int:
        return sum(v.nbytes for p in matrices for v in optimizer.state[p].values() if v.dim())

    plain, ours = model(), model()
    adam, muon = (torch.optim.AdamW(m.parameters()) for m in (plain, ours))
    use_muon_(muon, split(ours)[0])
    train(plain, adam, 1)
    train(ours, muon, 1)
    assert 2 * size(muon, split(ours)[0]) == size(adam, split(plain)[0])


def test_what_a_checkpoint_without_it_held_is_dropped_with_a_warning() -> None:
    plain, ours = model(), model()
    adam, muon = (torch.optim.AdamW(m.parameters()) for m in (plain, ours))
    matrices = split(ours)[0]
    use_muon_(muon, matrices)
    train(plain, adam, 2)
    with pytest.warns(UserWarning, match=f"saved without Muon: the momentum of {len(matrices)} matrices begins afresh"):
        muon.load_state_dict(adam.state_dict())
    train(ours, muon, 1)
    assert list(muon.state[matrices[0]]) == ["momentum_buffer"]


def test_a_state_is_loaded_bit_for_bit() -> None:
    whole, resumed = model(), model()
    first, second = (torch.optim.AdamW(m.parameters(), **ADAMW) for m in (whole, resumed))
    for optimizer, module in ((first, whole), (second, resumed)):
        use_muon_(optimizer, split(module)[0])
    train(whole, first, 3)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares what it loads
    train(whole, first, 3, start=3)
    train(resumed, second, 3, start=3)
    assert_equal(weights(resumed), weights(whole), "weights")
    with pytest.raises(ValueError, match="doesn't match the size"):
        second.load_state_dict(torch.optim.AdamW(list(whole.parameters())[:2]).state_dict())


def test_hooks_of_the_optimizer_run_once_after_both_steps() -> None:
    module = model()
    matrices = split(module)[0]
    optimizer = torch.optim.AdamW(module.parameters())
    use_muon_(optimizer, matrices)
    before, seen = matrices[0].detach().clone(), []
    optimizer.register_step_post_hook(lambda *_: seen.append(not torch.equal(before, matrices[0])))
    train(module, optimizer, 1)
    assert seen == [True]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.hidden = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 1)
        self.out = nn.Linear(4, 9)
        self.out.weight = self.embed.weight


def test_which_matrices() -> None:
    assert sorted(hidden_matrices(Tied())) == ["attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight"]


def fit(muon: Muon, module: Digits | None = None, *callbacks: Any) -> Digits:
    torch.manual_seed(0)
    module = module or Digits(regular=False, scheduler=None)
    module.validation_step = None  # type: ignore[assignment, method-assign]
    trainer = make_trainer([muon, *callbacks], max_epochs=1, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, train_loader())
    return module


def test_the_callback_chooses_and_says_what() -> None:
    muon = Muon()
    fit(muon)
    assert muon.choices == ["3 matrices of 6,144 numbers by Muon, 7 other parameters by AdamW"]
    muon = Muon(include=["again", "head.weight"], exclude=["again.bias", "head"])
    with pytest.raises(ValueError, match=r"`include` to match matrices, but again\.bias has not two dimensions"):
        fit(muon)
    muon = Muon(include=[r"again\.weight", r"head\.weight"], exclude=["head"])
    fit(muon)
    assert muon.choices[0].startswith("1 matrices of 1,024")


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` to match parameters, but 'tail' matches none"):
        fit(Muon(**{argument: ["tail"]}))


def test_nothing_to_step_is_said() -> None:
    with pytest.warns(NoEffectWarning, match="AdamW has no matrices of hidden layers"):
        fit(Muon(exclude=["weight"]))


def test_an_optimizer_that_steps_many_times_is_refused() -> None:
    class Quasi(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match=r"Muon can't work with LBFGS: .*use another optimizer"):
        fit(Muon(), Quasi(regular=False, scheduler=None))


def test_twice_is_refused() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    use_muon_(optimizer, split(module)[0])
    with pytest.raises(ValueError, match="has it already"):
        use_muon_(optimizer, split(module)[0])


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.9"):
        use_muon_(torch.optim.AdamW(module.parameters()), split(module)[0])


def test_the_fused_step_stays_under_the_rest() -> None:
    fused = FusedOptimizer()
    fit(Muon(), None, fused)
    assert fused.choices == ["AdamW: fused"]


def test_pruned_weights_stay_zero(tmp_path: Path) -> None:
    ran = run([Muon(), GradualPruning(amount=0.5, start=0, end=4, every=1)], Digits, final=tmp_path / "final.ckpt")
    assert (ran.weights["hidden.weight"] == 0).float().mean() > 0.3
