import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import trees, weights
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.weights import Adapted


def tree_of(layers: int) -> dict:
    flat = {f"layers/{i}/mlp/up": jnp.full((2, 3), i) for i in range(layers)}
    return trees.unflatten(flat | {"embed/table": jnp.zeros((5, 2))})


@trees.register
@dataclasses.dataclass(frozen=True)
class First:
    value: jax.Array
    sign: int = dataclasses.field(default=1, metadata={"static": True})


@trees.register
@dataclasses.dataclass(frozen=True)
class Second:
    value: jax.Array
    sign: int = dataclasses.field(default=1, metadata={"static": True})


def test_structures_of_two_classes_are_not_equal_whatever_their_fields():
    structure = jax.tree.structure
    assert structure(First(1.0)) != structure(Second(1.0))
    assert structure(First(1.0)) == structure(First(2.0)) != structure(First(1.0, -1))
    assert jax.tree.map(lambda x: -x, First(1.0, -1)) == First(-1.0, -1)
    ((path, _),) = jax.tree_util.tree_leaves_with_path({"a": First(1.0)})
    assert jax.tree_util.keystr(path) == "['a'].value"
    names = ("top_p", "min_p", "typical_p", "eta")
    structures = [structure(DecodingOptions(**{name: 0.5}).sampler()) for name in names]
    assert all(a != b for a, b in itertools.combinations(structures, 2))


def test_stacked_paths_expand_to_the_layers_they_hold():
    assert trees.expand("layers/0:24/5::6/mlp/up") == [f"layers/{i}/mlp/up" for i in (5, 11, 17, 23)]
    assert trees.expand("layers/24:26/1::2/mlp/up") == ["layers/25/mlp/up"]
    assert trees.expand("layers/3/mlp/up") == ["layers/3/mlp/up"]


@pytest.mark.parametrize("stages", [((1, 7),), ((3, 2), (1, 1)), ((2, 3), (1, 1)), ((7, 1),)])
def test_restage_there_and_back_is_the_identity(stages):
    tree = tree_of(7)
    stacked = trees.restage(tree, stages)
    for path, weight in trees.flatten(stacked).items():
        if layers := trees.layers_of(path):
            assert weight[:, 0, 0].tolist() == layers
    jax.tree.map(np.testing.assert_array_equal, trees.restage(stacked), tree)


def test_restage_moves_the_leaves_of_nodes_and_traces():
    node = Adapted(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(2))
    tree = trees.unflatten({f"layers/{i}/mlp/up": jax.tree.map(lambda x, i=i: x * i, node) for i in range(4)})
    stacked = jax.eval_shape(lambda t: trees.restage(t, ((2, 2),)), tree)
    assert stacked["layers"]["0:4"]["1::2"]["mlp"]["up"].scale.shape == (2,)
    back = trees.restage(trees.restage(tree, ((2, 2),)))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_restage_refuses_a_missing_layer():
    tree = tree_of(4)
    del tree["layers"]["2"]
    with pytest.raises(ValueError, match="3 of its 4 layers"):
        trees.restage(tree, ((1, 4),))


def test_first_match_wins_and_sees_per_layer_names():
    tree = trees.restage(tree_of(4), ((2, 2),))
    rules = ((r"layers/[02]/.*", "even"), (r"layers/.*", "odd"), (r".*", "rest"))
    assert trees.match(rules, tree, "r") == {
        "embed/table": "rest",
        "layers/0:4/0::2/mlp/up": "even",
        "layers/0:4/1::2/mlp/up": "odd",
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((r"layers/.*/mlp/down", 1), (r".*", 2)), "rule 'layers/.*/mlp/down' matches no parameter"),
        (((r"layers/.*", 1),), "no rule matches the parameter 'embed/table'"),
        (((r"layers/1/.*", 1), (r".*", 2)), "different values but are stacked"),
        (((r"layers/(", 1), (r".*", 2)), r"rule 'layers/\(' is not a regular expression"),
    ],
)
def test_errors_of_rules_name_the_rule(rules, message):
    with pytest.raises(UserError, match=message):
        trees.match(rules, trees.restage(tree_of(2), ((1, 2),)), "some.rules")


def test_check_lists_missing_additional_and_different_weights():
    have, want = tree_of(2), tree_of(2)
    trees.check(trees.describe(have), trees.describe(jax.eval_shape(lambda: want)), "here")
    del have["layers"]["0"]
    have["head"] = jnp.zeros(3)
    have["embed"]["table"] = jnp.zeros((5, 2), jnp.bfloat16)
    with pytest.raises(UserError) as error:
        trees.check(trees.describe(have), trees.describe(want), "here")
    for part in ("here: ", "-layers/0/mlp/up", "+head", "!embed/table is bfloat16[5, 2], expected float32[5, 2]"):
        assert part in str(error.value)


def test_records_tell_kinds_apart_and_make_them_again():
    node = Adapted(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(2))
    record = json.loads(json.dumps(trees.describe({"w": node})))
    with pytest.raises(UserError, match="Adapted"):
        trees.check(record, trees.describe({"w": jnp.ones((2, 3))}), "here")
    again = weights.abstract(record["w"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), again) == jax.tree.map(lambda x: (x.shape, x.dtype), node)


def test_layers_of_different_kinds_are_not_stacked():
    from llm_jax.weights import IN, to_qtensor

    w = jnp.ones((32, 4))
    alike = {"layers": {"0": {"up": w}, "1": {"up": w}}}
    mixed = {"layers": {"0": {"up": w}, "1": {"up": to_qtensor(w, "int8", IN)}}}
    schemes = {"layers": {"0": {"up": to_qtensor(w, "int4", IN)}, "1": {"up": to_qtensor(w, "int8", IN)}}}
    assert trees.stackable(alike, ((1, 2),)) and not trees.stackable(mixed, ((1, 2),))
    assert trees.stackable(mixed, ()) and trees.stackable(mixed, ((2, 1),)) and not trees.stackable(schemes, ((1, 2),))
    with pytest.raises(UserError, match="'layers/0:2/0::1/up' has different kinds of weights in its layers"):
        trees.restage(mixed, ((1, 2),))
