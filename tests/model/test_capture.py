"""Captured attentions and hidden states against a transformer written in numpy, layer by layer and head by head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.capture import capture
from llm_jax.model.transformer import init_cache

LENGTH = 10
POSITIONS = {
    **{kind: {"kind": kind} for kind in positions.SCHEMES},
    "t5": {"kind": "t5", "num_buckets": 8, "max_distance": 9},
    "shaw": {"kind": "shaw", "max_relative_position": 3},
}
LAYERS = {
    "uniform": {},
    "local": {"num_layers": 3, "layer_pattern": ("local", "global"), "window": 4, "remat": "full"},
    "encoder": {"causal": False, "norm_placement": "post"},
    "softcap": {"attention_softcap": 0.7, "attention_scale": 0.9},
}
CASES = [*((kind, "uniform") for kind in POSITIONS), ("rope", "local"), ("shaw", "local")]
CASES += [("t5", "encoder"), ("learned", "encoder"), ("alibi", "softcap")]
CACHED = [("rope", "local"), ("shaw", "uniform"), ("t5", "uniform"), ("alibi", "softcap"), ("learned", "uniform")]


@pytest.fixture
def any_model(request, make, tiny):
    kind, layers = request.param
    changes = {"qk_norm": False, "mlp": "plain", "activation": "relu", "num_kv_heads": 2} | LAYERS[layers]
    model, params = make(position=dataclasses.replace(tiny.model.position, **POSITIONS[kind]), **changes)
    # Weights of positions, and queries, start small: bring them up to where a mistake shows.
    return model, trees.map_weights(lambda path, w: w * 30 if "position" in path else w * 3, params)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotated(x, base):
    """x (B, T, N, H), pairs (i, i + H / 2) (Su et al. 2021, equation 34)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def t5_bucket(distance, buckets, far, causal):
    """Raffel et al. 2020, section 2.1, of one key position - query position."""
    start = 0
    if not causal:
        buckets //= 2
        start = buckets if distance > 0 else 0
    n = max(-distance, 0) if causal else abs(distance)
    exact = buckets // 2
    if n < exact:
        return start + n
    return start + min(buckets - 1, exact + int(np.log(n / exact) / np.log(far / exact) * (buckets - exact)))


def reference(config, params, tokens):
    """(attentions, hidden states, before the final norm as the last) in float64."""
    c, p = config, config.position
    h, group = positions.head_dim(c), c.num_heads // c.num_kv_heads
    tree = jax.tree.map(lambda a: np.asarray(a, np.float64), trees.unstack(params))
    offsets = np.arange(LENGTH)[None] - np.arange(LENGTH)[:, None]  # key - query

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * name["scale"]

    def heads(x, w):
        return (x @ w).reshape(*x.shape[:2], -1, h)

    x = tree["embed"]["table"][tokens]
    if p.kind == "learned":
        x = x + tree["embed"]["position_table"][:LENGTH]
    if p.kind == "sinusoidal":
        angles = np.arange(LENGTH)[:, None] * p.base ** (-np.arange(0, c.width, 2) / c.width)
        x = x + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(LENGTH, c.width)
    attentions, hidden = [], [x]
    for i in range(c.num_layers):
        layer, post = tree["layers"][str(i)], c.norm_placement == "post"
        w = layer["attention"]
        normed = x if post else norm(x, layer["attention_norm"])
        q, k, v = heads(normed, w["query"]), heads(normed, w["key"]), heads(normed, w["value"])
        if c.attention_scale:
            q = q * c.attention_scale * h**0.5
        if p.kind == "rope":
            q, k = rotated(q, p.base), rotated(k, p.base)
        scores = np.einsum("btnh,bsnh->bnts", q, k.repeat(group, 2)) / h**0.5
        if c.attention_softcap:
            scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
        if p.kind == "alibi":  # slopes 2^(-8 i / n) for a power of two
            slopes = 2.0 ** (-8 * np.arange(1, c.num_heads + 1) / c.num_heads)
            scores = scores - slopes[:, None, None] * np.abs(offsets)
        if p.kind == "t5":
            buckets = np.vectorize(lambda d: t5_bucket(d, p.num_buckets, p.max_distance, c.causal))(offsets)
            scores = scores + tree["embed"]["position_bias"][buckets].transpose(2, 0, 1)
        clipped = np.clip(offsets, -p.max_relative_position, p.max_relative_position) + p.max_relative_position
        if p.kind == "shaw":
            scores = scores + np.einsum("btnh,tsh->bnts", q, w["position_keys"][clipped]) / h**0.5
        seen = offsets <= 0 if c.causal else np.full_like(offsets, True, bool)
        if c.layer_pattern[i % len(c.layer_pattern)] == "local":
            seen = seen & (np.abs(offsets) < c.window)
        shares = softmax(np.where(seen, scores, -np.inf))
        out = np.einsum("bnts,bsnh->btnh", shares, v.repeat(group, 2))
        if p.kind == "shaw":
            out = out + np.einsum("bnts,tsh->btnh", shares, w["position_values"][clipped])
        x = x + out.reshape(*x.shape[:2], -1) @ w["out"]
        x = norm(x, layer["attention_norm"]) if post else x
        normed = x if post else norm(x, layer["mlp_norm"])
        x = x + np.maximum(normed @ layer["mlp"]["up"], 0) @ layer["mlp"]["down"]
        x = norm(x, layer["mlp_norm"]) if post else x
        attentions.append(shares)
        hidden.append(x)
    if not post:
        hidden[-1] = norm(x, tree["final_norm"])
    return attentions, hidden


@pytest.mark.parametrize(
    ("any_model", "scan_layers"),
    [*((case, True) for case in CASES), (("rope", "local"), False), (("shaw", "uniform"), False)],
    indirect=["any_model"],
)
def test_attentions_and_hidden_states_equal_those_of_numpy(any_model, scan_layers):
    model, params = any_model
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 3, 259)
    attentions, hidden = reference(model.config, params, np.asarray(tokens))
    if not scan_layers:
        model, params = model.clone(config=dataclasses.replace(model.config, scan_layers=False)), trees.unstack(params)
    captured = jax.jit(lambda p: capture(model, p, tokens))(params)
    assert len(captured.attentions) == model.config.num_layers == len(captured.hidden_states) - 1
    for got, want in zip(captured.attentions, attentions, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    for got, want in zip(captured.hidden_states, hidden, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    np.testing.assert_array_equal(captured.logits, jax.jit(lambda p: model.apply({"params": p}, tokens))(params))
    assert captured.cache is None


@pytest.mark.parametrize("any_model", CACHED, indirect=True)
def test_prefill_and_decoding_steps_have_the_attentions_of_the_whole_sequence(any_model):
    model, params = any_model
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 3, 259)
    whole = jax.jit(lambda p: capture(model, p, tokens))(params)
    cache, slots = init_cache(model.config, 2, LENGTH + 3), LENGTH + 3
    for start, stop in ((0, 6), (6, 7), (7, LENGTH)):
        count = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
        where = TokenMetadata(count, jnp.ones_like(count))
        step = jax.jit(lambda p, cache, part, where: capture(model, p, part, where, cache))
        part = step(params, cache, tokens[:, start:stop], where)
        cache = part.cache
        for got, want in zip(part.attentions, whole.attentions, strict=True):
            assert got.shape == (2, model.config.num_heads, stop - start, slots)
            np.testing.assert_allclose(got[..., :stop], want[:, :, start:stop, :stop], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(got[..., stop:], 0)
        for got, want in zip(part.hidden_states, whole.hidden_states, strict=True):
            np.testing.assert_allclose(got, want[:, start:stop], rtol=1e-3, atol=1e-3)


@pytest.mark.live
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "phi", "bert"])
def test_attentions_and_hidden_states_equal_those_of_transformers(name, tmp_path):
    """`output_attentions` and `output_hidden_states` of the tiny models of the golden file, every layer and head."""
    import json

    import torch
    import transformers
    from safetensors.numpy import save_file

    from llm_jax.checkpoints import huggingface
    from tests.checkpoints import family_cases as cases
    from tests.checkpoints.test_hf import GOLDEN, read

    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    save_file(cases.tensors(name, GOLDEN[name]["shapes"]), tmp_path / "model.safetensors")
    kind, model, params = read(tmp_path)
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), params)
    huggingface.save(tmp_path / "out", kind, model.config, params, {})
    load = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    peer = load.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids = cases.ids(name)
    with torch.no_grad():
        expected = peer(input_ids=torch.tensor(ids), output_attentions=True, output_hidden_states=True)
    captured = jax.jit(lambda p: capture(model, p, jnp.asarray(ids)))(params)
    assert len(captured.attentions) == len(expected.attentions) == model.config.num_layers
    assert len(captured.hidden_states) == len(expected.hidden_states) == model.config.num_layers + 1
    for got, want in zip(captured.attentions, expected.attentions, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-6)
    for got, want in zip(captured.hidden_states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "cure"),
    [("attention_mask", "metadata=TokenMetadata"), ("output_attentions", "capture"), ("input_ids", "come after")],
)
def test_keyword_arguments_of_other_codebases_name_those_of_this_model(make, name, cure):
    model, params = make()
    with pytest.raises(UserError, match=f"the model has no argument '{name}'; .*{cure}"):
        model.apply({"params": params}, jnp.zeros((1, 2), int), **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'zzz'"):
        model.apply({"params": params}, jnp.zeros((1, 2), int), zzz=1)
