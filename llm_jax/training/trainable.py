"""What a run trains: all weights, or adapters over frozen ones.

trained, fixed = kind.begin(base, key)         `fixed` are the parts of adapters that are not trained
frozen = kind.freeze(base, fixed)
params = kind.whole(trained, frozen, key)      what the model sees
saved = kind.saved(trained, frozen)            what a checkpoint holds; kind.split is the inverse
"""

import dataclasses
from typing import Any, ClassVar

import jax

from llm_jax import lora, trees
from llm_jax.errors import UserError
from llm_jax.quant import post_training, qat
from llm_jax.schema import Config, LoraConfig, QuantConfig
from llm_jax.weights import Node

Trees = tuple[Any, Any]

# What would be ignored where there are no adapters, and the value that asks for nothing. (Not targets and alpha, which
# a recipe for adapters keeps when it is run over all weights.)
_IDLE = {
    "ranks": (),
    "rank_stabilized": False,
    "variant": "lora",
    "factors": "",
    "dropout": 0.0,
    "b_lr_ratio": 1.0,
}


@dataclasses.dataclass(frozen=True)
class AllWeights:
    """Pretraining and full fine-tuning, rounded on the way under `quant.qat`: nothing is frozen."""

    quant: QuantConfig
    adapts: ClassVar[bool] = False

    def begin(self, base: Any, key: jax.Array) -> Trees:
        for path, weight in trees.flatten(base).items():
            if isinstance(weight, Node):
                raise UserError(
                    f"init_from: '{path}' is a {type(weight).__name__} there, not full weights; start from what it was "
                    "made of, or set lora.rank to train adapters over it"
                )
        return qat.prepare(base, self.quant), {}

    def freeze(self, base: Any, fixed: Any) -> Any:
        return {}

    def whole(self, trained: Any, frozen: Any, key: Any = None, step: Any = None) -> Any:
        return trained if step is None else qat.delayed(trained, step, self.quant.qat.start_step)

    def saved(self, trained: Any, frozen: Any) -> Any:
        return trained

    def split(self, saved: Any) -> Trees:
        return saved, {}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """LoRA and its variants (`llm_jax.lora`), over a base that is quantized under `quant.scheme` (QLoRA)."""

    config: LoraConfig
    quant: QuantConfig
    adapts: ClassVar[bool] = True

    def begin(self, base: Any, key: jax.Array) -> Trees:
        # PiSSA takes its start out of the full weights; others begin from what will be frozen.
        seen = base if self.config.variant == "pissa" else post_training.base(base, self.quant)
        original = base if self.quant.scheme else None
        return self.split(lora.init(key, seen, self.config, original))

    def freeze(self, base: Any, fixed: Any) -> Any:
        return {"base": post_training.base(lora.rebase(base, fixed), self.quant), "fixed": fixed}

    def whole(self, trained: Any, frozen: Any, key: Any = None, step: Any = None) -> Any:
        adapters = lora.join(trained, frozen["fixed"])
        c = self.config
        return lora.attach(frozen["base"], adapters, factors=c.factors, dropout=c.dropout, key=key)

    def saved(self, trained: Any, frozen: Any) -> Any:
        return lora.join(trained, frozen["fixed"])

    def split(self, saved: Any) -> Trees:
        return lora.split(saved, self.config.variant)


def kind(config: Config) -> AllWeights | Adapters:
    """By `lora.rank`. Raises UserError where adapters have no base."""
    if not config.lora.rank:
        for name, idle in _IDLE.items():
            if (value := getattr(config.lora, name)) != idle:
                raise UserError(f"lora.{name}={value} is of adapters, and lora.rank=0 trains all weights")
        if config.quant.scheme:
            raise UserError(f"quant.scheme={config.quant.scheme} is of the frozen base of adapters; set lora.rank")
        return AllWeights(config.quant)
    if not config.init_from:
        raise UserError("lora.rank adapts pretrained weights; name them by init_from")
    if config.quant.qat.scheme:
        raise UserError(f"quant.qat.scheme={config.quant.qat.scheme} rounds trained weights; see lora.factors")
    return Adapters(config.lora, config.quant)
