"""Every method once, with a small configuration: the table that the conformance suite runs its checks over.

A method is a list of callbacks, written as a LightningCLI YAML would have them: the same table drives Python and YAML.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback

from tests.accelerator import ACCELERATOR

__all__ = ["METHODS", "STACKS", "STRATEGY_NAMES", "Method", "build", "use"]

Spec = dict[str, Any]
STRATEGY_NAMES = ("zero1", "zero2", "zero3", "fsdp2")
"""ZeROStrategy at its stages, and FullyShardStrategy."""


def use(name: str, **init_args: Any) -> Spec:
    """A class of the package and its arguments, as in a YAML file; ``name`` may also be a whole dotted path."""
    path = name if name.startswith("tests.") else f"lightning_accel.{name}"
    return {"class_path": path, "init_args": init_args} if init_args else {"class_path": path}


def build(value: Any) -> Any:
    """Make the objects that a specification names, those inside its arguments first."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = {key: build(item) for key, item in value.get("init_args", {}).items()}
        return find_class(value)(**arguments)
    if isinstance(value, list):
        return [build(item) for item in value]
    return copy.deepcopy(value)


def find_class(spec: Spec) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """One row: a configuration, and what each check may expect of it."""

    name: str
    callbacks: list[Spec]
    """What is added to the Trainer's callbacks; it must act in the toy run of 27 batches in 3 epochs."""
    neutral: list[Spec] | None = None
    """The settings that ask for nothing; a pair of methods has none of its own."""
    neutral_warning: str = ""
    """The regular expression of the ``NoEffectWarning`` that they give, where they are not meant to be used so."""
    silent: str = ""
    """Why a run with it is bit for bit the plain run; empty where it must differ."""
    manual: str = ""
    """The regular expression of its refusal under manual optimization; empty where it works."""
    accumulation: str = ""
    """The regular expression of its refusal of ``Trainer(accumulate_grad_batches=2)``; empty where it works."""
    single: float | None = 1e-6
    """How far two ranks' weights may be from one's at the same global batch; ``None`` where they need not agree."""
    not_single: str = ""
    """Why they need not agree."""
    optimizer: str = "sgd"
    """Which one two ranks have in that check; other than SGD's, Adam's steps are large where only rounding differs."""
    finds_rate: bool = False
    """Whether it trains with another rate than was configured, which schedulers then start from."""
    logs: tuple[str, ...] = ()
    """The metrics that it logs itself."""
    differs: Mapping[str, str] = field(default_factory=dict)
    """The strategies of :data:`STRATEGY_NAMES` under which its numbers are not those of DDP, and why not."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """The strategies of :data:`STRATEGY_NAMES` that it refuses, and the regular expression of each refusal.

    Under all others it gives the numbers of DDP, unless ``differs`` says why not, and keeps the resume law and the
    neutral law.
    """
    bad: tuple[tuple[dict[str, Any], type[Exception], str], ...] = ()
    """Arguments that its class must refuse: the exception, and the name of the argument that it blames."""

    def make(self, *, neutral: bool = False, keys: tuple[str, str] | None = None) -> list[Callback]:
        """New callbacks; ``keys`` are the batch's input and target key, for those that ask for them."""
        specs = self.neutral if neutral else self.callbacks
        assert specs is not None, f"{self.name} has no neutral settings"
        return [build(with_keys(spec, keys)) for spec in specs]


def with_keys(spec: Spec, keys: tuple[str, str] | None) -> Spec:
    """``spec`` for a batch that is a dictionary with these keys."""
    if keys is None:
        return spec
    known = inspect.signature(find_class(spec)).parameters
    given = {name: key for name, key in zip(("input_key", "target_key"), keys, strict=True) if name in known}
    return {**spec, "init_args": {**spec.get("init_args", {}), **given}}


MANUAL_ACCUMULATION = "GradientAccumulation can't work with manual optimization.*set `automatic_optimization = True`"
MANUAL_MICRO = "MicroBatching can't work with manual optimization.*set `automatic_optimization = True`"
TRAINER_ACCUMULATION = "remove `accumulate_grad_batches` from the Trainer"

NO_BLOCKS = dict.fromkeys(
    ("zero1", "zero2", "zero3"),
    "LowBitOptimizer can't work with ZeROStrategy: its flat partitions run across parameters",
)
NO_KERNELS = {**NO_BLOCKS, "fsdp2": "bitsandbytes has no kernels for sharded parameters. Use backend='generic'"}
NO_NOISE = dict.fromkeys(
    ("zero1", "zero2", "zero3"),
    "NoiseScaleAccumulation can't work with ZeROStrategy: its engine reduces and splits gradients inside the backward",
)
NO_CLIMB = dict.fromkeys(
    ("zero1", "zero2", "zero3"),
    "SAM can't work with ZeROStrategy: its engine reduces and splits gradients.*FullyShardStrategy",
)
NO_AVERAGE = dict.fromkeys(
    ("zero1", "zero2", "zero3"), "ScheduleFree can't work with ZeROStrategy: it keeps its weights and state flat"
)
NO_RANKING = {
    "zero3": "GradualPruning can't work with ZeROStrategy at stage 3: it shards the weights.*Stages 1 and 2 work too",
    "fsdp2": "GradualPruning can't work with FullyShardStrategy: it shards the weights",
}

NO_AUTO = dict.fromkeys(
    ("zero1", "zero2", "zero3", "fsdp2"),
    r"MicroBatching\(size='auto'\) can't work with .*: its forward and backward have collective operations inside",
)

FLIP = use("augment.RandomHorizontalFlip")
CROP = use("augment.RandomCrop", size=8, padding=1)
MIX = [use("augment.MixUp", alpha=0.4, per_sample=True), use("augment.CutMix", p=0.5)]

AUGMENTATION = use("BatchAugmentation", transforms=[FLIP, CROP, *MIX])
SMOOTHING = use("LabelSmoothing", smoothing=0.1)
FREE = use("ScheduleFree", warmup_steps=3, schedulers="keep", batch_norm_batches=0)  # the toy has schedulers
LOW_BIT = use("LowBitOptimizer", min_size=512)  # half of it is whole blocks: sharded over two ranks nothing differs
ROUNDED = 1e-4  # a last bit decides how a value that lies between two codes is rounded
ACCUMULATION = use("GradientAccumulation", factor=2)
IN_BACKWARD = use("OptimizerInBackward")
PRUNING = use("GradualPruning", amount=0.8, start="0.1fit", end="0.7fit", every="2step")

METHODS = [
    Method(
        "GradientAccumulation",
        [ACCUMULATION],
        neutral=[use("GradientAccumulation", factor=1)],
        manual=MANUAL_ACCUMULATION,
        accumulation=TRAINER_ACCUMULATION,
        bad=(
            ({"factor": 0}, ValueError, "factor"),
            ({"factor": 2.0}, TypeError, "factor"),
            ({"factor": True}, TypeError, "factor"),
            ({"factor": {}}, ValueError, "factor"),
            ({"factor": {"2 moons": 2}}, ValueError, "factor"),
            ({"factor": {0: -1}}, ValueError, "factor[0]"),
            ({"target_batch_size": 0}, ValueError, "target_batch_size"),
            ({"factor": 2, "target_batch_size": 8}, ValueError, "target_batch_size"),
            ({"unit": "words"}, ValueError, "unit"),
            ({"weight_by": "words"}, ValueError, "weight_by"),
            ({"weight_by": "tokens"}, ValueError, "count_key"),
            ({"count_key": 1.5}, TypeError, "count_key"),
            ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ),
    ),
    Method(
        "GradientAccumulation schedule",
        [use("GradientAccumulation", factor={0: 2, "0.5fit": 4})],
        neutral=[use("GradientAccumulation", factor={0: 1, "0.5fit": 1})],
        manual=MANUAL_ACCUMULATION,
        accumulation=TRAINER_ACCUMULATION,
    ),
    Method(
        "GradientAccumulation tokens",
        [use("GradientAccumulation", target_batch_size=16, weight_by="tokens", count_key=1)],
        neutral=[use("GradientAccumulation", factor=1, ignore_index=0)],
        manual=MANUAL_ACCUMULATION,
        accumulation=TRAINER_ACCUMULATION,
    ),
    Method(
        "NoiseScaleAccumulation",
        # measured, but fixed: the toy's OneCycleLR asks how many steps there will be. test_noise_scale.py has it grow
        [use("NoiseScaleAccumulation", min_factor=2, max_factor=2, every="2step", scale_lr="sqrt")],
        neutral=[use("NoiseScaleAccumulation", min_factor=1, max_factor=1)],
        manual="NoiseScaleAccumulation can't work with manual optimization.*set `automatic_optimization = True`",
        accumulation=TRAINER_ACCUMULATION,
        logs=("noise_scale", "accumulation_factor"),
        refused=NO_NOISE,
        bad=(
            ({"min_factor": 0}, ValueError, "min_factor"),
            ({"max_factor": 1.5}, TypeError, "max_factor"),
            ({"min_factor": 4, "max_factor": 2}, ValueError, "max_factor"),
            ({"every": 0}, ValueError, "every"),
            ({"every": "soon"}, ValueError, "every"),
            ({"smoothing": 1.0}, ValueError, "smoothing"),
            ({"shrink": 1}, TypeError, "shrink"),
            ({"scale_lr": "cubic"}, ValueError, "scale_lr"),
        ),
    ),
    Method(
        "MicroBatching",
        [use("MicroBatching", size=3)],
        neutral=[use("MicroBatching", size=1000)],
        neutral_warning="MicroBatching has no effect",
        manual=MANUAL_MICRO,
        bad=(
            ({"size": 0}, ValueError, "size"),
            ({"size": "half"}, TypeError, "size"),
            ({"size": 2.0}, TypeError, "size"),
            ({"size": True}, TypeError, "size"),
            ({"weight_by": "batches"}, ValueError, "weight_by"),
            ({"weight_by": "tokens"}, ValueError, "count_key"),
            ({"count_key": "labels"}, ValueError, "count_key"),
            ({"count_key": 1.5}, TypeError, "count_key"),
            ({"ignore_index": 0.5}, TypeError, "ignore_index"),
            ({"shared_keys": "mask"}, TypeError, "shared_keys"),
            ({"list_keys": [1.5]}, TypeError, "list_keys"),
            ({"grow_after": 0}, ValueError, "grow_after"),
            ({"size": 2, "grow_after": 3}, ValueError, "grow_after"),
            ({"memory_budget": "2 bananas"}, ValueError, "memory_budget"),
            ({"memory_budget": 1.5}, TypeError, "memory_budget"),
            ({"size": 2, "memory_budget": "2GiB"}, ValueError, "memory_budget"),
        ),
    ),
    Method(
        "MicroBatching auto",
        [use("MicroBatching", memory_budget="90KB", grow_after=5)],
        neutral=[use("MicroBatching", size=1000)],
        neutral_warning="MicroBatching has no effect",
        manual=MANUAL_MICRO,
        refused=NO_AUTO,
    ),
    Method(
        "BatchAugmentation",
        [AUGMENTATION],
        neutral=[
            use(
                "BatchAugmentation",
                transforms=[
                    use("augment.RandomHorizontalFlip", p=0.0),
                    use("augment.MixUp", alpha=0.0),
                    use("augment.CutMix", p=0.0),
                ],
            )
        ],
        single=None,
        not_single="each rank draws for its own samples",
        bad=(
            ({"transforms": []}, ValueError, "transforms"),
            ({"transforms": "MixUp"}, TypeError, "transforms"),
            ({"transforms": [1]}, TypeError, "transforms"),
            ({"transforms": [FLIP], "seed": -1}, ValueError, "seed"),
            ({"transforms": [FLIP], "seed": 0.5}, TypeError, "seed"),
        ),
    ),
    Method(
        "LabelSmoothing",
        [SMOOTHING],
        neutral=[use("LabelSmoothing", smoothing=0.0)],
        bad=(
            ({"smoothing": 1.3}, ValueError, "smoothing"),
            ({"smoothing": -0.1}, ValueError, "smoothing"),
            ({"smoothing": "much"}, TypeError, "smoothing"),
        ),
    ),
    Method(
        "LowBitOptimizer",
        [LOW_BIT],
        refused=NO_BLOCKS,
        neutral=[use("LowBitOptimizer", min_size=1_000_000)],
        neutral_warning="LowBitOptimizer has no effect",
        bad=(
            ({"bits": 7}, ValueError, "bits"),
            ({"bits": "8"}, TypeError, "bits"),
            ({"backend": "cuda"}, ValueError, "backend"),
            ({"min_size": 0}, ValueError, "min_size"),
            ({"keep_32bit": "head"}, TypeError, "keep_32bit"),
            ({"keep_32bit": ["("]}, ValueError, "keep_32bit"),
            ({"moments": {"exp_avg": "plus"}}, ValueError, "moments['exp_avg']"),
            ({"bits_for": ["head"]}, TypeError, "bits_for"),
            ({"bits_for": {"head": 7}}, ValueError, "bits_for['head']"),
            ({"keep_embeddings": 1}, TypeError, "keep_embeddings"),
            ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding"),
            ({"save_32bit": "no"}, TypeError, "save_32bit"),
            ({"paged": 1}, TypeError, "paged"),
            ({"paged": True, "bits": 4}, ValueError, "paged"),
            ({"stochastic_rounding": True, "seed": -1}, ValueError, "seed"),
        ),
    ),
    Method(
        "LowBitOptimizer 4 bit",
        [use("LowBitOptimizer", bits=4, min_size=512)],
        single=None,
        not_single="a last bit decides how a value that lies between two codes is rounded, and those of 4 bits are far "
        "apart",
        refused=NO_BLOCKS,
        neutral=[use("LowBitOptimizer", bits=4, min_size=1_000_000)],
        neutral_warning="LowBitOptimizer has no effect",
    ),
    Method(
        "LowBitOptimizer fp8",
        [use("LowBitOptimizer", bits="fp8", min_size=512)],
        refused=NO_BLOCKS,
        neutral=[use("LowBitOptimizer", bits="fp8", min_size=1_000_000)],
        neutral_warning="LowBitOptimizer has no effect",
    ),
    Method(
        "LowBitOptimizer by name",
        [use("LowBitOptimizer", min_size=512, bits_for={"hidden": 4, "between": "bf16"})],
        single=None,
        not_single="a last bit decides how a value that lies between two codes is rounded, and those of 4 bits are far "
        "apart",
        refused=NO_BLOCKS,
        neutral=[use("LowBitOptimizer", min_size=1_000_000, bits_for={"hidden": 32})],
        neutral_warning="LowBitOptimizer has no effect",
    ),
    Method(
        "LowBitOptimizer stochastic rounding",
        [use("LowBitOptimizer", stochastic_rounding=True, min_size=512), use("tests.conformance.toy.InBfloat16")],
        single=None,
        not_single="gradients in bfloat16 are summed in another order",
        differs={"fsdp2": "each rank draws for its part of a parameter"},
        refused=NO_BLOCKS,
        neutral=[use("LowBitOptimizer", stochastic_rounding=True, min_size=1_000_000)],
        neutral_warning="LowBitOptimizer has no effect",
    ),
    Method(
        "LowBitOptimizer torchao",
        [use("LowBitOptimizer", backend="torchao", min_size=512, bits_for={"between": 4})],
        single=None,
        not_single="a last bit decides how a value that lies between two codes is rounded",
        optimizer="adamw",
        manual="torchao has no optimizer with the maths of SGD. Use backend='generic'",
        refused={**NO_BLOCKS, "fsdp2": "torchao codes a decoded moment otherwise than it was.*Use backend='generic'"},
        neutral=[use("LowBitOptimizer", backend="torchao", min_size=1_000_000)],
        neutral_warning="LowBitOptimizer has no effect",
    ),
    Method(
        "LowBitOptimizer bitsandbytes",
        [use("LowBitOptimizer", backend="bitsandbytes", min_size=256)],
        single=ROUNDED,
        refused=NO_KERNELS,
        neutral=[use("LowBitOptimizer", backend="bitsandbytes", min_size=1_000_000)],
        neutral_warning="LowBitOptimizer has no effect",
    ),
    Method(
        "FusedOptimizer",
        [use("FusedOptimizer")],
        neutral=[use("FusedOptimizer", enabled=False)],
        bad=(({"enabled": 1}, TypeError, "enabled"),),
    ),
    Method(
        "OptimizerInBackward",
        [IN_BACKWARD],
        neutral=[use("OptimizerInBackward", enabled=False)],
        silent="it takes the same steps, earlier",
        manual="OptimizerInBackward can't work with manual optimization.*Set `automatic_optimization = True`",
        accumulation=r"OptimizerInBackward can't work with Trainer\(accumulate_grad_batches=2\).*Remove one",
        refused=dict.fromkeys(
            ("zero1", "zero2", "zero3"),
            "OptimizerInBackward can't work with ZeROStrategy: its engine reduces gradients.*Use 'accel_fsdp2'",
        ),
        bad=(({"enabled": 1}, TypeError, "enabled"),),
    ),
    Method(
        "GradualPruning global",
        [PRUNING],
        refused=NO_RANKING,
        neutral=[use("GradualPruning", amount=0.0)],
        bad=(
            ({"amount": 1.3}, ValueError, "amount"),
            ({"amount": "most"}, TypeError, "amount"),
            ({"start": "soon"}, ValueError, "start"),
            ({"start": "0.5fit", "end": "0.4fit"}, ValueError, "end"),
            ({"every": 0}, ValueError, "every"),
            ({"schedule": "zigzag"}, ValueError, "schedule"),
            ({"scope": "planet"}, ValueError, "scope"),
            ({"include": "head"}, TypeError, "include"),
            ({"exclude": ["("]}, ValueError, "exclude"),
        ),
    ),
    Method(
        "GradualPruning layer",
        [{**PRUNING, "init_args": {**PRUNING["init_args"], "scope": "layer"}}],
        refused=NO_RANKING,
        neutral=[use("GradualPruning", amount=0.0, scope="layer")],
    ),
    Method(
        "Muon",
        [use("Muon", exclude=["again"])],
        refused=dict.fromkeys(
            ("zero1", "zero2", "zero3", "fsdp2"), "Muon can't work with .*: orthogonalising needs whole matrices"
        ),
        neutral=[use("Muon", include=[])],
        single=None,
        not_single="it orthogonalises in bfloat16, and a last bit of the gradient turns the smallest directions",
        bad=(
            ({"include": "hidden"}, TypeError, "include"),
            ({"exclude": ["("]}, ValueError, "exclude"),
            ({"momentum": 1.0}, ValueError, "momentum"),
            ({"nesterov": 1}, TypeError, "nesterov"),
            ({"weight_decay": -1}, ValueError, "weight_decay"),
            ({"adjust_lr": "up"}, ValueError, "adjust_lr"),
            ({"ns_steps": 0}, ValueError, "ns_steps"),
        ),
    ),
    Method(
        "SAM",
        [use("SAM", every=2)],
        neutral=[use("SAM", rho=0.0)],
        manual="SAM can't work with manual optimization.*set `automatic_optimization = True`",
        refused=NO_CLIMB,
        bad=(
            ({"rho": -0.1}, ValueError, "rho"),
            ({"rho": "far"}, TypeError, "rho"),
            ({"adaptive": 1}, TypeError, "adaptive"),
            ({"eta": -1}, ValueError, "eta"),
            ({"every": 0}, ValueError, "every"),
            ({"every": "1epoch"}, ValueError, "every"),
            ({"every": 1.5}, TypeError, "every"),
            ({"start": "soon"}, ValueError, "start"),
        ),
    ),
    Method(
        "SAM adaptive",
        [use("SAM", adaptive=True, start="0.2fit")],
        neutral=[use("SAM", rho=0.0, adaptive=True)],
        manual="SAM can't work with manual optimization.*set `automatic_optimization = True`",
        refused=NO_CLIMB,
    ),
    Method(
        "GradientClipping",
        [use("GradientClipping", threshold=0.1)],
        neutral=[use("GradientClipping", threshold=float("inf"))],
        manual="GradientClipping can't work with manual optimization.*Call `self.clip_gradients",
        bad=(
            ({"threshold": 0}, ValueError, "threshold"),
            ({"threshold": "much"}, TypeError, "threshold"),
            ({"by": "hand"}, ValueError, "by"),
            ({"by": "adaptive", "exclude": "head"}, TypeError, "exclude"),
            ({"by": "adaptive", "exclude": ["("]}, ValueError, "exclude"),
            ({"eps": 0}, ValueError, "eps"),
        ),
    ),
    Method(
        "GradientClipping adaptive",
        [use("GradientClipping", threshold=0.002, by="adaptive", exclude=["head"])],
        refused=dict.fromkeys(
            ("zero1", "zero2", "zero3"), "by='adaptive'.*can't work with ZeROStrategy: its engine splits gradients"
        ),
        neutral=[use("GradientClipping", threshold=float("inf"), by="adaptive")],
        manual="GradientClipping can't work with manual optimization.*Call `self.clip_gradients",
    ),
    Method(
        "EMA",
        [use("EMA", decay=0.9, every="2step", start="0.1fit")],
        neutral=[use("EMA", decay=0.0)],
        silent="it trains nothing otherwise: it changes what is evaluated, and what is left in the end",
        bad=(
            ({"decay": 1.5}, ValueError, "decay"),
            ({"decay": "slow"}, TypeError, "decay"),
            ({"every": 0}, ValueError, "every"),
            ({"start": "soon"}, ValueError, "start"),
            ({"warmup": 1}, TypeError, "warmup"),
            ({"keep": "both"}, ValueError, "keep"),
            ({"device": "moon"}, ValueError, "device"),
        ),
    ),
    Method(
        "ScheduleFree",
        [FREE],
        neutral=[use("ScheduleFree", enabled=False)],
        refused=NO_AVERAGE,
        bad=(
            ({"warmup_steps": -1}, ValueError, "warmup_steps"),
            ({"warmup_steps": 0.1}, TypeError, "warmup_steps"),
            ({"momentum": 1.0}, ValueError, "momentum"),
            ({"momentum": "high"}, TypeError, "momentum"),
            ({"r": -1}, ValueError, "r"),
            ({"weight_lr_power": -1}, ValueError, "weight_lr_power"),
            ({"schedulers": "ignore"}, ValueError, "schedulers"),
            ({"batch_norm_batches": -1}, ValueError, "batch_norm_batches"),
            ({"enabled": 1}, TypeError, "enabled"),
        ),
    ),
    Method(
        "ScheduleFree batch norm",
        [use("ScheduleFree", momentum=0.8, schedulers="keep", batch_norm_batches=2)],
        neutral=[use("ScheduleFree", enabled=False, batch_norm_batches=2)],
        manual=r"ScheduleFree\(batch_norm_batches=...\) can't work with manual optimization.*set it to 0",
        refused=NO_AVERAGE,
    ),
    Method(
        "BatchSizeFinder",
        # it finds the size that the toy has on one rank, so that the checks keep their places in the data
        [use("BatchSizeFinder", max_size=8, steps_per_trial=2, memory_budget="1GiB")],
        neutral=[use("BatchSizeFinder", enabled=False)],
        silent="it finds the batch size that is configured",
        single=None,
        not_single="the size that it finds is one of each rank, whatever the number of ranks",
        refused=dict.fromkeys(STRATEGY_NAMES, "BatchSizeFinder can't work with .*: its shards.*`lightning-accel plan`"),
        bad=(
            ({"min_size": 0}, ValueError, "min_size"),
            ({"min_size": 8, "max_size": 4}, ValueError, "max_size"),
            ({"mode": "guess"}, ValueError, "mode"),
            ({"steps_per_trial": 1}, ValueError, "steps_per_trial"),
            ({"margin": 1.0}, ValueError, "margin"),
            ({"memory_budget": "8 gallons"}, ValueError, "memory_budget"),
            ({"memory_budget": 1.5}, TypeError, "memory_budget"),
            ({"batch_arg_name": 3}, TypeError, "batch_arg_name"),
            ({"enabled": 1}, TypeError, "enabled"),
        ),
    ),
    Method(
        "LearningRateFinder",
        [use("LearningRateFinder", min_lr=1e-5, max_lr=0.3, num_steps=20)],
        neutral=[use("LearningRateFinder", enabled=False)],
        finds_rate=True,
        manual="LearningRateFinder can't work with manual optimization.*a module of automatic optimization",
        refused=dict.fromkeys(
            ("zero1", "zero2", "zero3"),
            "Training on the side .* can't work with ZeROStrategy.*configure what was found",
        ),
        bad=(
            ({"min_lr": 0}, ValueError, "min_lr"),
            ({"min_lr": 0.1, "max_lr": 0.01}, ValueError, "max_lr"),
            ({"num_steps": 2}, ValueError, "num_steps"),
            ({"method": "guess"}, ValueError, "method"),
            ({"smoothing": 1.0}, ValueError, "smoothing"),
            ({"early_stop": 0.5}, ValueError, "early_stop"),
            ({"plot": 3}, TypeError, "plot"),
            ({"enabled": 1}, TypeError, "enabled"),
        ),
    ),
    Method(
        "ExactResume",
        [use("ExactResume")],
        neutral=[use("ExactResume")],
        silent="it acts when a run is resumed",
    ),
    Method(
        "AutoResume",
        [use("AutoResume", dirpath="nothing saved here")],
        neutral=[use("AutoResume", dirpath="nothing saved here")],
        silent="it acts when a run is started again",
        bad=(
            ({"dirpath": 3}, TypeError, "dirpath"),
            ({"dirpath": ""}, ValueError, "dirpath"),
            ({"dirpath": "s3://bucket/run"}, ValueError, "dirpath"),
        ),
    ),
]

STACKS = [
    Method(
        "LowBitOptimizer + GradientAccumulation",
        [LOW_BIT, ACCUMULATION],
        manual=MANUAL_ACCUMULATION,
        accumulation=TRAINER_ACCUMULATION,
        single=ROUNDED,
    ),
    Method("GradualPruning + LowBitOptimizer", [PRUNING, LOW_BIT]),
    Method(
        "SAM + GradientAccumulation tokens",
        [use("SAM"), use("GradientAccumulation", target_batch_size=16, weight_by="tokens", count_key=1)],
        manual="can't work with manual optimization.*set `automatic_optimization = True`",
        accumulation=TRAINER_ACCUMULATION,
    ),
    Method(
        "SAM + BatchAugmentation + GradualPruning + EMA + GradientAccumulation",
        [use("SAM"), AUGMENTATION, PRUNING, use("EMA", decay=0.9), use("FusedOptimizer"), ACCUMULATION],
        manual="can't work with manual optimization.*set `automatic_optimization = True`",
        accumulation=TRAINER_ACCUMULATION,
        single=None,
        not_single="each rank draws for its own samples",
    ),
    Method(
        "OptimizerInBackward + GradualPruning + LowBitOptimizer",
        [IN_BACKWARD, PRUNING, LOW_BIT],
        manual="OptimizerInBackward can't work with manual optimization",
        accumulation="OptimizerInBackward can't work with Trainer",
    ),
    Method("EMA + GradualPruning", [use("EMA", decay=0.9), PRUNING]),
    Method("ScheduleFree + GradualPruning", [FREE, PRUNING]),
    Method(
        "BatchAugmentation + LabelSmoothing + GradientAccumulation",
        [AUGMENTATION, SMOOTHING, ACCUMULATION],
        manual=MANUAL_ACCUMULATION,
        accumulation=TRAINER_ACCUMULATION,
        single=None,
        not_single="each rank draws for its own samples",
    ),
    Method(
        "everything",
        [PRUNING, LOW_BIT, use("FusedOptimizer"), ACCUMULATION, SMOOTHING, AUGMENTATION, use("ExactResume")],
        manual=MANUAL_ACCUMULATION,
        accumulation=TRAINER_ACCUMULATION,
        single=None,
        not_single="each rank draws for its own samples",
    ),
]

NOT_ON_CUDA = {
    "MicroBatching auto": "its budget is of what a step makes, and on CUDA counts all that torch holds",
    "LowBitOptimizer torchao": "there it refuses the schedule of the toy, which changes `betas` in every step",
    "BatchSizeFinder": "what it reports is of the whole process, which other runs have used before",
}
if ACCELERATOR == "cuda":  # tests/cuda has them
    METHODS[:] = [method for method in METHODS if method.name not in NOT_ON_CUDA]
