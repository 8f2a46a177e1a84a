"""What a run trains: all weights, or adapters over frozen ones.

trained, fixed = kind.begin(base)              `fixed` are the parts of adapters that are not trained
frozen = kind.freeze(base, fixed)
params = kind.whole(trained, frozen, key)      what the model sees
saved = kind.saved(trained, frozen)            what a checkpoint holds; kind.split is the inverse
"""

import dataclasses
from typing import Any

import jax

from llm_jax import lora
from llm_jax.config import Config, LoraConfig
from llm_jax.errors import UserError

Trees = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class AllWeights:
    """Pretraining and full fine-tuning: nothing is frozen."""

    adapts: bool = False

    def begin(self, base: Any) -> Trees:
        return base, {}

    def freeze(self, base: Any, fixed: Any) -> Any:
        return {}

    def whole(self, trained: Any, frozen: Any, key: jax.Array | None = None) -> Any:
        return trained

    def saved(self, trained: Any, frozen: Any) -> Any:
        return trained

    def split(self, saved: Any) -> Trees:
        return saved, {}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """LoRA and its variants (`llm_jax.lora`)."""

    config: LoraConfig
    seed: int
    adapts: bool = True

    def begin(self, base: Any) -> Trees:
        return self.split(lora.init(jax.random.key(self.seed), base, self.config))

    def freeze(self, base: Any, fixed: Any) -> Any:
        return {"base": lora.rebase(base, fixed), "fixed": fixed}

    def whole(self, trained: Any, frozen: Any, key: jax.Array | None = None) -> Any:
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
        return AllWeights()
    if not config.init_from:
        raise UserError("lora.rank adapts pretrained weights; name them by init_from")
    return Adapters(config.lora, config.train.seed)
