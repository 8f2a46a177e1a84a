"""LoRA on other architectures: a ConvNeXt V2 block and a small denoising diffusion model. L11.

Both are plain Flax modules; `lora.materialize` adapts their kernels inside the jitted loss. A base is trained on one
task, frozen, and adapted to another.

- `convnext`: classify the orientation of a grating (one of four); then the same with black and white exchanged in one
  half of the picture. A block as in Woo et al. 2023 (arXiv:2301.00808): depthwise 7 x 7, LayerNorm, 1 x 1,
  GELU, global response normalization, 1 x 1.
- `diffusion`: predict the noise of points on a ring (Ho et al. 2020, arXiv:2006.11239); then of points on a line.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import flags

from llm_jax import cli, configuration, lora, trees
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Finding
from llm_jax.training import step
from llm_jax.training.setup import num_parameters

CLASSES, SIZE, NOISES = 4, 12, 32


class ConvNeXt(nn.Module):
    """A stem, one ConvNeXt V2 block and a head: pictures (B, H, W, 1) -> logits (B, classes)."""

    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (2, 2), strides=(2, 2), name="stem")(x)
        y = nn.Conv(self.width, (7, 7), feature_group_count=self.width, name="depthwise")(x)
        y = nn.gelu(nn.Dense(4 * self.width, name="expand")(nn.LayerNorm()(y)))
        norm = jnp.sqrt(jnp.sum(y**2, (1, 2), keepdims=True) + 1e-6)  # global response normalization
        scale, shift = (self.param(n, nn.initializers.zeros, (4 * self.width,)) for n in ("gamma", "beta"))
        y = scale * (y * norm / (jnp.mean(norm, -1, keepdims=True) + 1e-6)) + shift + y
        x = x + nn.Dense(self.width, name="reduce")(y)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class Denoiser(nn.Module):
    """Noisy points (B, 2) and times (B,) in 0 to 1 -> the noise (B, 2)."""

    width: int = 96

    @nn.compact
    def __call__(self, x, time):
        waves = time[:, None] * 2.0 ** jnp.arange(6)
        x = jnp.concatenate([x, jnp.sin(waves), jnp.cos(waves)], -1)
        for i in range(3):
            x = nn.silu(nn.Dense(self.width, name=f"hidden_{i}")(x))
        return nn.Dense(2, name="out")(x)


def gratings(key, new):
    """Pictures float32 (64, SIZE, SIZE, 1) and their orientations, int32 (64,); `new`: of the second task."""
    a, b, c = jax.random.split(key, 3)
    label = jax.random.randint(a, (64,), 0, CLASSES)
    angle = jnp.pi * label / CLASSES
    phase = 2 * jnp.pi * jax.random.uniform(b, (64,))
    y, x = jnp.meshgrid(jnp.arange(SIZE), jnp.arange(SIZE), indexing="ij")
    wave = jnp.cos(angle)[:, None, None] * x + jnp.sin(angle)[:, None, None] * y
    picture = jnp.sin(1.2 * wave + phase[:, None, None])
    if new:
        picture = picture * jnp.where(jnp.arange(SIZE) < SIZE // 2, 1, -1)
    return picture[..., None] + 0.8 * jax.random.normal(c, (64, SIZE, SIZE, 1)), label


def classify(params, key, new):
    picture, label = gratings(key, new)
    logits = ConvNeXt().apply({"params": params}, picture)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def denoise(params, key, new):
    a, b, c = jax.random.split(key, 3)
    turn = jax.random.uniform(a, (256,))
    ring = jnp.stack([jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)], -1)
    points = jnp.stack([3 * turn - 1.5, 0.5 - turn], -1) if new else ring
    level = jax.random.randint(b, (256,), 1, NOISES) / NOISES
    kept = jnp.cos(level * jnp.pi / 2)[:, None]  # the cosine schedule
    noise = jax.random.normal(c, points.shape)
    predicted: Any = Denoiser().apply({"params": params}, kept * points + jnp.sqrt(1 - kept**2) * noise, level)
    return jnp.mean((predicted - noise) ** 2)


# name -> (loss, model, inputs of its initialization, adapted weights, rank)
CASES = {
    "convnext": (classify, ConvNeXt(), (jnp.zeros((1, SIZE, SIZE, 1)),), r"(depthwise|expand|reduce)/kernel", 4),
    "diffusion": (denoise, Denoiser(), (jnp.zeros((1, 2)), jnp.zeros(1)), r"hidden_\d/kernel", 8),
}


flags.DEFINE_integer("seeds", 3, "number of base models of each architecture", lower_bound=1)
flags.DEFINE_integer("steps", 200, "training steps on the new task, after twice as many on the first", lower_bound=1)


def main() -> None:
    f = flags.FLAGS
    root = experiments.directory(f.runs, f.steps)
    figures, origins = experiments.measure(root, CASES, f.seeds, lambda name, seed: run(name, f.steps, seed))
    results = [judge(name, runs) for name, runs in figures.items()]
    print(experiments.publish(__file__, results, table(figures), origins=origins))


def run(name: str, steps: int, seed: int) -> dict[str, float]:
    """Test losses on the new task of the frozen base, the adapted and the fully fine-tuned model."""
    loss, model, inputs, targets, rank = CASES[name]
    settings = dataclasses.replace(configuration.default().lora, rank=rank, alpha=2.0 * rank, targets=(targets,))
    key = jax.random.key(seed)
    base = train(
        functools.partial(loss, new=False), model.init(key, *inputs)["params"], jax.random.fold_in(key, 1), 2 * steps
    )
    before = trees.fingerprint(base)
    trained, fixed = lora.split(lora.init(jax.random.fold_in(key, 2), base, settings), settings.variant)
    new_loss, new_key = functools.partial(loss, new=True), jax.random.fold_in(key, 3)

    def bind(trained):
        return lora.materialize(base, lora.join(trained, fixed))

    @jax.jit
    def test(params):
        return jnp.mean(jax.vmap(lambda key: new_loss(params, key))(jax.random.split(jax.random.key(99), 32)))

    adapted = train(lambda trained, key: new_loss(bind(trained), key), trained, new_key, steps)
    full = train(new_loss, base, new_key, steps)
    losses = {"frozen": float(test(base)), "adapted": float(test(bind(adapted))), "full": float(test(full))}
    return losses | {
        "taken back": (losses["frozen"] - losses["adapted"]) / (losses["frozen"] - losses["full"]),
        "trained share": num_parameters(trained) / num_parameters(base),
        "base unchanged": float(trees.fingerprint(base) == before),
    }


def train(loss, params, key, steps: int):
    """The parameters after `steps` steps of Adam."""
    optimizer = optax.adam(3e-3)

    def objective(params, frozen, batch, i, _):
        return loss(params, jax.random.fold_in(key, i)), jnp.float32(1)

    update = step.make(objective, optimizer, optax.constant_schedule(3e-3), seed=0, grad_accumulation=1)

    batches = {"mask": jnp.ones(steps), "segments": jnp.ones(steps)}

    @jax.jit
    def all_steps(params):
        def body(state, batch):
            return update(state, {}, batch)[0], None

        return jax.lax.scan(body, step.init(optimizer, params), batches)[0].params

    return all_steps(params)


def judge(name: str, runs: list[dict[str, float]]) -> Finding:
    """The verdict by the rule of statements.toml."""
    gained = [r["taken back"] for r in runs]
    cheap = all(r["trained share"] <= 0.25 and r["base unchanged"] for r in runs)
    verdict = verdicts.all_at_least(gained, holds=0.5, fails=0.1)
    verdict = "undecided" if verdict == "holds" and not cheap else verdict
    measure = "share of the loss between frozen and full that adapters take back"
    return findings.finding("L11", measure, findings.span(gained), verdict, n=len(runs), part=name)


def table(figures: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown."""

    def span(name: str) -> Callable[[findings.Runs], str]:
        return lambda runs: findings.interval_text(findings.span([run[name] for run in runs]))

    title = "Test loss on the new task, mean (least to most) of the seeds:"
    columns = {name: span(name) for name in next(iter(figures.values()))[0]}
    return ["", title, "", *findings.condition_table("model", figures, columns)]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"seeds": 2, "steps": 2}))
