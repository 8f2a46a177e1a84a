"""The two kinds of training: of all weights, or of adapters over frozen weights.

    trainable, constants = method.init(base, key)       `constants` are the parts of adapters that are not trained
    frozen = method.freeze(base, constants)
    params = method.model_params(trainable, frozen)     the parameters that the model is applied with
    saved = method.checkpoint_params(trainable, frozen)     the content of a checkpoint; `method.split` is the inverse

Both classes have the same methods, so that other code need not distinguish them.
"""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from llm_jax import lora, trees, weights
from llm_jax.errors import UserError
from llm_jax.model.transformer import width_ratio
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.quant import post_training, qat
from llm_jax.schema import Config
from llm_jax.training import optim

Trees = tuple[Any, Any]

# {option that has no effect without adapters: its neutral value}. (`targets` and `alpha` are not included, because a
# recipe for adapters keeps them when it is run with lora.rank=0.)
ADAPTERS_ONLY: dict[str, Any] = {
    "ranks": (),
    "rank_stabilized": False,
    "variant": "lora",
    "factors": "",
    "dropout": 0.0,
    "b_lr_ratio": 1.0,
}


@dataclasses.dataclass(frozen=True)
class FullTraining:
    """Pretraining and full fine-tuning, with fake quantization under `quant.qat`. Nothing is frozen."""

    config: Config

    def reads_base(self, resumed: bool) -> bool:
        """Whether the initial weights are needed; a resumed run reads its checkpoint instead."""
        return not resumed

    def init(self, base: Any, key: jax.Array) -> Trees:
        """Returns (all weights, {}). Raises UserError if a weight of `base` is not a dense array."""
        for path, weight in trees.flatten(base).items():
            if not weights.is_dense(weight):
                raise UserError(
                    f"init_from: '{path}' is a {weights.kind(weight)}, and full fine-tuning needs dense weights; "
                    "start from the checkpoint it was made from, or set lora.rank to train adapters over it"
                )
        return qat.prepare(base, self.config.quant), {}

    def freeze(self, base: Any, constants: Any) -> dict[str, Any]:
        return {}

    def model_params(self, trainable: Any, frozen: Any, key: Any = None, step: Any = None) -> Any:
        return trainable if step is None else qat.active_from(trainable, step, self.config.quant.qat.start_step)

    def checkpoint_params(self, trainable: Any, frozen: Any) -> Any:
        return trainable

    def split(self, saved: Any) -> Trees:
        return saved, {}

    def optimizer(self, base: Any, trainable: Any) -> optax.GradientTransformation:
        """The optimizer of `optim`, from the abstract base and trainable parameters."""
        c = self.config
        return optim.make(c.optim, c.train.steps, trainable, width_ratio(c.model))

    def shardings(self, trainable: Any, mesh: Mesh) -> Any:
        """The shardings of the trainable parameters, by `mesh.rules`."""
        return mesh_lib.shardings(trainable, self.config.mesh.rules, mesh)

    def donates_base(self) -> bool:
        """Whether `init` may reuse the memory of the base."""
        return True


@dataclasses.dataclass(frozen=True)
class AdapterTraining:
    """LoRA and its variants (`llm_jax.lora`), over a base that `quant.scheme` quantizes (QLoRA)."""

    config: Config

    def reads_base(self, resumed: bool) -> bool:
        """Whether the weights of `init_from` are needed: always, because a checkpoint contains only the adapters."""
        return True

    def init(self, base: Any, key: jax.Array) -> Trees:
        """Returns (trainable parts of the adapters, constant parts), each keyed by the path of the adapted weight."""
        c = self.config
        # PiSSA starts from the full weights; other variants start from the frozen ones.
        adapted = base if c.lora.variant == "pissa" else post_training.quantize_base(base, c.quant)
        original = base if c.quant.scheme else None
        return self.split(lora.init(key, adapted, c.lora, original))

    def freeze(self, base: Any, constants: Any) -> dict[str, Any]:
        return {
            "base": post_training.quantize_base(lora.subtract_start(base, constants), self.config.quant),
            "constants": constants,
        }

    def model_params(self, trainable: Any, frozen: Any, key: Any = None, step: Any = None) -> Any:
        c, adapters = self.config.lora, lora.join(trainable, frozen["constants"])
        return lora.attach(frozen["base"], adapters, factors=c.factors, dropout=c.dropout, key=key)

    def checkpoint_params(self, trainable: Any, frozen: Any) -> Any:
        return lora.join(trainable, frozen["constants"])

    def split(self, saved: Any) -> Trees:
        return lora.split(saved, self.config.lora.variant)

    def optimizer(self, base: Any, trainable: Any) -> optax.GradientTransformation:
        """The optimizer of `optim`; adapters have the weight decay and the learning rate of the adapted weight."""
        c = self.config
        return optim.make(c.optim, c.train.steps, base, width_ratio(c.model), trainable, c.lora.b_lr_ratio)

    def shardings(self, trainable: Any, mesh: Mesh) -> Any:
        """The shardings of the trainable parameters; adapters are small and replicated."""
        return jax.tree.map(lambda _: mesh_lib.replicated(mesh), trainable)

    def donates_base(self) -> bool:
        """Whether `init` may reuse the memory of the base."""
        return False


TrainingMethod = FullTraining | AdapterTraining


def training_method(config: Config) -> TrainingMethod:
    """Returns the kind of training: adapters if `lora.rank` is above 0, else full training.

    Raises:
      UserError: options of adapters with rank 0, adapters without `init_from`, or QAT with adapters.
    """
    if not config.lora.rank:
        for name, no_effect in ADAPTERS_ONLY.items():
            if (value := getattr(config.lora, name)) != no_effect:
                raise UserError(f"lora.{name}={value} has no effect with lora.rank=0; set lora.rank to train adapters")
        ignored = sorted(key for key in config.explicit if key.startswith("lora."))
        if ignored and "lora.rank" not in config.explicit:
            raise UserError(f"{ignored[0]} is set and has no effect with lora.rank=0; set lora.rank, such as 8")
        if config.quant.scheme:
            raise UserError(
                f"quant.scheme={config.quant.scheme} quantizes the frozen base of adapters; set lora.rank, or see "
                "quant.qat.scheme for quantization-aware training"
            )
        return FullTraining(config)
    if not config.init_from:
        raise UserError("lora.rank trains adapters over pretrained weights; name them with init_from")
    if config.quant.qat.scheme:
        raise UserError(
            f"quant.qat.scheme={config.quant.qat.scheme} applies to full training; for adapters see lora.factors"
        )
    return AdapterTraining(config)
