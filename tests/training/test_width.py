"""Width transfer (muP): the better of two learning rates at a small width is also better at a large width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import configuration as config_lib
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.model.transformer import Transformer, width_ratio
from llm_jax.training import losses, optim, step
from tests.research.verdict_cases import load

LOW, HIGH = 2.0**-6, 2.0**-2


@pytest.mark.slow
def test_the_better_learning_rate_is_the_same_across_widths():
    """At width 32 the high rate is better; at width 256 it is so with width transfer, and not without."""
    config = config_lib.load("default", load("width_transfer.sweep").SETTING)
    c, source = config.train, Source(config.data)
    tokenizer = source.tokenizer(config.tokenizer)
    corpus = source.corpus(tokenizer)

    def stacked(rows, *shape):
        made = [rows[i] for i in range(int(np.prod(shape)))]
        return {name: np.stack([row[name] for row in made]).reshape(*shape, -1) for name in made[0]}

    batches = stacked(Shuffled(Rows(corpus.train, c.seq_len), 0), c.steps, c.batch_size)
    held = stacked(Rows(corpus.validation, c.seq_len), 256)

    def gain(width, base):
        """The held-out loss after training at the low rate minus that at the high one, nats per byte."""
        heads = {"num_heads": width // 8, "num_kv_heads": width // 8, "vocab_size": tokenizer.vocab_size}
        sizes = dataclasses.replace(config.model, width=width, mlp_dim=2 * width, base_width=base, **heads)
        model = Transformer(sizes)

        @jax.jit
        def loss_after(rate):
            params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
            rule = dataclasses.replace(config.optim, lr=rate)
            optimizer = optim.make(rule, c.steps, params, width_ratio(sizes))
            one = step.make(losses.make(config.loss, model, 0), optimizer, optim.schedule(rule, c.steps), 0, 1)
            begun = step.init(optimizer, params)
            state, _ = jax.lax.scan(lambda s, b: (one(s, None, b)[0], None), begun, batches)
            total, count = losses.language_model(model, state.params, held, 0)
            return total / count

        return float(loss_after(LOW) - loss_after(HIGH))

    assert gain(32, 32) > 0.02
    assert gain(256, 32) > 0.02
    assert gain(256, 0) < -0.02
