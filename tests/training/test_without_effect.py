"""Notes on options that the chosen kind does not use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import configuration, extensions
from llm_jax.training import optim, start, without_effect


@pytest.mark.parametrize(("changes", "message"), [
    ({"optim.momentum": 0.9}, "optim.momentum=0.9 has no effect with optim.kind='adamw'; it is used with muon"),
    ({"optim.schedule": "cosine", "optim.decay_fraction": 0.5}, "optim.schedule='cosine'; it is used with wsd"),
    ({"model.position.kind": "alibi", "model.position.base": 1e5}, "used with sinusoidal, rope"),
    ({"model.position.scaling_factor": 2.0}, "model.position.scaling='none'; it is used with linear, ntk, dynamic,"),
    ({"loss.mask_prob": 0.3}, "loss.mask_prob=0.3 has no effect with loss.masked='none'"),
    ({"data.kind": "instructions", "data.field": "body"}, "data.kind='instructions'; it is used with text"),
    ({"data.labelled.question": "What?"}, "data.kind='text'; it is used with labelled"),
    ({"model.window": 8}, "model.window=8 has no effect with model.layer_pattern=('global',)"),
])  # fmt: skip
def test_an_option_without_effect_is_noted(changes, message):
    (note,) = without_effect.notes(configuration.load("default", changes))
    assert note.startswith("note: ") and message in note and "\n" not in note


def test_options_with_an_effect_defaults_and_those_of_custom_parts_are_not_noted():
    for changes in (
        {"optim.kind": "muon", "optim.momentum": 0.9, "optim.schedule": "wsd", "optim.decay_fraction": 0.5},
        {"model.position.kind": "alibi", "model.position.base": 10000.0, "quant.qat.scheme": "int8"},
        {"optim.kind": "my.py:Own", "optim.momentum": 0.9, "optim.eps": 1e-6},
        {"model.layer_pattern": ("local",), "model.window": 8},
    ):
        assert not list(without_effect.notes(configuration.load("default", changes)))
    for recipe in configuration.recipes(configuration.Config):
        assert not list(without_effect.notes(configuration.load(recipe))), recipe


def test_a_run_prints_the_note_before_its_first_step():
    begin = start.find(configuration.load("default", {"optim.momentum": 0.9}))
    assert any("optim.momentum" in note for note in start.notes(begin))
    assert not list(start.notes(dataclasses.replace(begin, record={"step": 1})))


def test_every_option_and_value_of_the_table_exists():
    flat = configuration.flat(configuration.default())
    for selector, used in without_effect._USED.items():
        names = {f"{selector.rpartition('.')[0]}.{name}" for value in used.values() for name in value}
        assert {selector, *names} <= flat.keys()
    assert without_effect._USED["optim.kind"].keys() == optim.OPTIMIZERS.keys()
    assert without_effect._USED["optim.schedule"].keys() == optim.SCHEDULES.keys()
    # Values of these do not determine which other options are used.
    others = {"tokenizer.kind", "data.format", "quant.scheme", "quant.head", "quant.rules", "lora.factors"}
    assert set(extensions.KEYS) - without_effect._USED.keys() == others


def test_the_table_names_what_optimizers_and_schedules_use(tiny):
    params = {"layers": {"0": {"up": jnp.arange(12.0).reshape(3, 4)}}, "bias": jnp.ones(3)}
    draws = [jax.tree.map(lambda x, i=i: jnp.cos((i + 1.0) * (x + 1)), params) for i in range(5)]
    changes = {"beta1": 0.5, "beta2": 0.5, "eps": 0.1, "momentum": 0.5}

    def values(config):
        @jax.jit
        def update():
            rule = optim.OPTIMIZERS[config.kind].make(config)
            state, results = rule.init(params), []
            for gradients in draws:
                updates, state = rule.update(gradients, state, params)
                results.append(updates)
            return results

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update())])

    for kind, used in without_effect._USED["optim.kind"].items():
        base = dataclasses.replace(tiny.optim, kind=kind)
        before = values(base)
        for name, value in changes.items():
            changed = values(dataclasses.replace(base, **{name: value}))
            assert (not np.array_equal(before, changed)) == (name in used), (kind, name)
    for kind, used in without_effect._USED["optim.schedule"].items():
        base = dataclasses.replace(tiny.optim, schedule=kind)
        for name in ("final_lr_fraction", "decay_fraction"):
            both = [optim.schedule(c, 100)(95) for c in (base, dataclasses.replace(base, **{name: 0.5}))]
            assert (both[0] != both[1]) == (name in used), (kind, name)
