"""The figures of pictures, against computations of numpy that share no code with them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import checkpoints, lora, tokenizers, trees, weights
from llm_jax.decoding import samplers
from llm_jax.decoding.options import DecodingOptions
from llm_jax.decoding.samplers import History
from llm_jax.errors import UserError
from llm_jax.model.capture import capture
from llm_jax.pictures import neighbourhoods, weight_updates

TEXT = "one token and then"
BYTE = tokenizers.get("byte").train([], 0)


@pytest.fixture(scope="module")
def loaded(trained):
    return llm_jax.load(trained, scan_layers=True)


def position(tiny, **changes):
    return dataclasses.replace(tiny.model, position=dataclasses.replace(tiny.model.position, **changes))


def test_attention_maps_are_those_of_capture_and_their_measures_follow(loaded):
    model, params, tokenizer = loaded
    maps = llm_jax.show.attention(*loaded, TEXT, layers=[1], heads=[3, 0])
    ids = tokenizers.prompt(tokenizer, TEXT)
    assert len(maps.tokens) == len(ids) == maps.probabilities.shape[-1] and maps.tokens[0] == "<bos>"
    expected = jax.jit(lambda p, t: capture(model, p, t))(params, jnp.asarray([ids])).attentions[1][0]
    np.testing.assert_allclose(maps.probabilities[0], np.asarray(expected)[[3, 0]], atol=1e-6)
    np.testing.assert_allclose(maps.probabilities.sum(-1), 1, atol=1e-5)
    assert np.all(np.triu(maps.probabilities[0, 0], 1) == 0)
    rows = maps.probabilities[0, 1].astype(float)
    measures = {name: values[0, 1] for name, values in maps.measures().items()}
    count = len(ids) - 1
    assert measures["probability of the first token"] == pytest.approx(
        sum(rows[i, 0] for i in range(1, count + 1)) / count
    )
    assert measures["probability of the previous token"] == pytest.approx(
        sum(rows[i, i - 1] for i in range(1, count + 1)) / count
    )
    assert measures["probability of the token itself"] == pytest.approx(
        sum(rows[i, i] for i in range(1, count + 1)) / count
    )
    entropy = -sum(p * math.log2(p) for i in range(1, count + 1) for p in rows[i, : i + 1] if p > 0) / count
    assert measures["entropy"] == pytest.approx(entropy, rel=1e-5)
    with pytest.raises(UserError, match="head=4; the model has the heads 0 to 3"):
        llm_jax.show.attention(*loaded, TEXT, heads=[4])


def test_biases_and_decays_of_positions_follow_the_formulas_of_the_papers(tiny):
    (bias,) = llm_jax.show.positions(position(tiny, kind="alibi"), length=5).curves
    slopes = np.array([2**-2, 2**-4, 2**-6, 2**-8])  # 2^(-8 i / n) of n = 4 heads
    np.testing.assert_allclose(bias.values, -slopes[:, None] * np.arange(6))
    assert bias.labels == ("head 0", "head 1", "head 2", "head 3") and bias.distances.tolist() == [0, 1, 2, 3, 4, 5]
    score, bound = llm_jax.show.positions(position(tiny, kind="rope", base=100.0), length=40).curves
    theta = [100.0 ** (-2 * i / 8) for i in range(4)]  # heads of width 8
    for m in (0, 1, 7, 40):
        assert score.values[0, m] == pytest.approx(sum(math.cos(m * t) for t in theta) / 4, abs=1e-5)
        sums = [abs(sum(complex(math.cos(m * t), math.sin(m * t)) for t in theta[:j])) for j in range(1, 5)]
        assert bound.values[0, m] == pytest.approx(sum(sums) / 4, abs=1e-5)
    (cosine,) = llm_jax.show.positions(position(tiny, kind="sinusoidal"), length=9).curves
    frequencies = [10000.0 ** (-2 * i / 32) for i in range(16)]
    np.testing.assert_allclose(
        cosine.values[0], [np.mean([math.cos(d * f) for f in frequencies]) for d in range(10)], atol=1e-5
    )
    encoder = dataclasses.replace(position(tiny, kind="alibi"), causal=False)
    (both,) = llm_jax.show.positions(encoder, length=2).curves
    assert both.distances.tolist() == [-2, -1, 0, 1, 2] and both.values[0].tolist() == [-0.5, -0.25, 0, -0.25, -0.5]


def test_trained_position_weights_are_read_from_the_parameters(tiny, make):
    for kind, rows in (("t5", 1), ("learned", 1), ("shaw", 2)):
        model, params = make(position=position(tiny, kind=kind, max_length=12).position)
        curves = llm_jax.show.positions(model.config, params, 20).curves
        assert len(curves) == rows
        with pytest.raises(UserError, match="has trained weights; give --checkpoint"):
            llm_jax.show.positions(model.config, None, 20)
        flat = trees.flatten(trees.unstack(params))
        if kind == "t5":  # bucket 0 is distance 0, bucket 5 distance 5
            np.testing.assert_allclose(curves[0].values[:, [0, 5]], np.asarray(flat["embed/position_bias"])[[0, 5]].T)
        if kind == "learned":
            table = np.asarray(flat["embed/position_table"], float)
            pairs = [
                table[i + 3] @ table[i] / np.linalg.norm(table[i + 3]) / np.linalg.norm(table[i]) for i in range(9)
            ]
            assert curves[0].values.shape == (1, 12) and curves[0].values[0, 3] == pytest.approx(np.mean(pairs))
        if kind == "shaw":  # the key at distance 2 before the query has the offset -2
            table = np.asarray(flat["layers/1/attention/position_keys"])
            at = curves[0].distances.tolist().index(2)
            assert curves[0].values[1, at] == pytest.approx(np.linalg.norm(table[len(table) // 2 - 2]), rel=1e-6)
    with pytest.raises(UserError, match="no effect that depends on distance"):
        llm_jax.show.positions(position(tiny, kind="none"))


def test_surprisals_sum_to_the_bits_of_evaluate(loaded, trained, command, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    figures = json.loads(command("evaluate", f"--checkpoint={trained}", f"--data={path}", "--json").stdout)
    result = llm_jax.show.surprisal(*loaded, TEXT, eos=True)
    assert math.isnan(result.bits[0]) and result.tokens[-1] == "<eos>" and len(result.bits) == figures["tokens"] + 1
    assert np.nansum(result.bits) == pytest.approx(figures["loss"] * figures["tokens"] / math.log(2), rel=1e-4)
    assert np.nansum(result.bits) / result.num_bytes == pytest.approx(figures["bits_per_byte"], rel=1e-4)


def test_the_candidates_of_a_step_are_those_of_the_sampler(loaded):
    model, params, tokenizer = loaded
    options = DecodingOptions(max_new_tokens=3, temperature=0.7, top_k=5, top_p=0.9, seed=4)
    result = llm_jax.show.probabilities(*loaded, TEXT, options, candidates=6)
    ids = tokenizers.prompt(tokenizer, TEXT)
    logits = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, jnp.asarray([ids]))[:, -1]
    logits = jnp.where(jnp.arange(logits.shape[-1]) < tokenizer.vocab_size, logits, -jnp.inf)
    chain = (samplers.Temperature(0.7), samplers.TopK(5), samplers.TopP(0.9))
    history = History(jnp.asarray([ids]), jnp.asarray([len(ids)]), jnp.asarray([len(ids)]))
    stages = [jax.nn.softmax(x)[0] for x in samplers.Sampler(chain).stages(logits, history)]
    step = result.steps[0]
    assert step.candidates[:5] == np.argsort(-np.asarray(logits[0]), kind="stable")[:5].tolist()
    assert len(step.stages) == 4 and step.final == step.stages[-1] and step.model == step.stages[0]
    for got, want in zip(step.stages, stages, strict=True):
        np.testing.assert_allclose(got, np.asarray(want)[step.candidates], atol=1e-5)
    assert sum(p > 0 for p in step.stages[2]) == 5 and step.final[step.candidates.index(step.chosen)] > 0
    (drawn,) = llm_jax.decoding.complete.complete(model, params, tokenizer, [TEXT], options)
    assert [s.chosen for s in result.steps][: len(drawn[0].generated.ids)] == drawn[0].generated.ids
    assert len(result.sampled) == len(result.steps)


def test_neighbours_in_the_table_and_by_layer_are_those_of_numpy(loaded):
    model, params, tokenizer = loaded
    nearest = llm_jax.show.embeddings(*loaded, "e", count=3)
    table = np.asarray(trees.flatten(params)["embed/table"], float)[: tokenizer.vocab_size]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    own = tokenizer.encode("e")[0]
    cosines = unit @ unit[own]
    order = [i for i in np.argsort(-cosines) if i != own][:3]
    np.testing.assert_allclose(nearest.cosines[0], cosines[order], atol=1e-5)
    texts = ["the model reads", "a token and the end"]
    result = llm_jax.show.embeddings(*loaded, "the", texts, count=2)
    assert result.word == "[the] model reads" and result.levels == ("embeddings", "layer 0", "layer 1")
    ids = [tokenizers.prompt(tokenizer, text) for text in texts]
    run = jax.jit(lambda p, t: capture(model, p, t).hidden_states[1][0])
    hidden = [np.asarray(run(params, jnp.asarray([row])), float) for row in ids]
    spots = {  # BOS is before the first byte
        "[the] model reads": hidden[0][1:4],
        "the [model] reads": hidden[0][5:10],
        "the model [reads]": hidden[0][11:16],
        "[a] token and": hidden[1][1:2],
        "a [token] and the": hidden[1][3:8],
        "a token [and] the end": hidden[1][9:12],
        "token and [the] end": hidden[1][13:16],
        "and the [end]": hidden[1][17:20],
    }
    means = {name: part.mean(0) for name, part in spots.items()}
    first = means.pop("[the] model reads")
    cosine = {name: v @ first / np.linalg.norm(v) / np.linalg.norm(first) for name, v in means.items()}
    best = sorted(cosine, key=lambda name: -cosine[name])[:2]
    assert list(result.neighbours[1]) == best
    np.testing.assert_allclose(result.cosines[1], [cosine[name] for name in best], atol=1e-5)
    with pytest.raises(UserError, match="does not occur in the texts"):
        llm_jax.show.embeddings(*loaded, "zebra", texts)


def test_words_cover_their_bytes_and_follow_special_tokens():
    ids = [1, *BYTE.encode("né go"), 2]
    assert neighbourhoods.words_of(BYTE, "né go", ids) == [("né", [1, 2, 3]), ("go", [5, 6])]


def test_quantization_errors_are_those_of_rounding_by_hand(loaded):
    _, params, _ = loaded
    result = llm_jax.show.quantization(params, ["int8", "int4:16"])
    flat = trees.flatten(trees.unstack(params))
    assert all(path.startswith("layers/") and "norm" not in path for path in result.paths)
    path = "layers/1/mlp/down"
    w = np.asarray(flat[path], float)
    scale = np.abs(w).max(0) / 127  # int8 has a scale for each output
    rounded = np.round(w / scale) * scale
    error = np.linalg.norm(w - rounded) / np.linalg.norm(w)
    assert result.errors[0, result.paths.index(path)] == pytest.approx(error, rel=1e-2)
    names, errors = result.by_layer()
    assert errors.shape == (2, 2, 7) and errors[0, 1, names.index("mlp/down")] == pytest.approx(error, rel=1e-2)
    assert np.all(errors[1] > 4 * errors[0]) and result.bits[0] > 8 > result.bits[1] > 4
    assert {"key", "value", "down"} < set(str(result).split())  # a text has six letters for each column
    whole = llm_jax.show.quantization(params, ["int8"], head=True)
    assert "embed/table" in whole.paths


def test_singular_values_are_those_of_the_update(loaded, tiny):
    _, params, _ = loaded
    config = dataclasses.replace(tiny.lora, rank=3, alpha=6.0)
    adapters = lora.init(jax.random.key(0), params, config)
    adapters = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    result = weight_updates.adapters(params, adapters)
    flat, entries = trees.flatten(trees.unstack(params)), trees.flatten(trees.unstack(adapters))
    path = result.paths[-1]
    a, b, scale = (np.asarray(entries[f"{path}/{name}"], float) for name in ("a", "b", "scale"))
    update = a @ b * scale
    expected = np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(result.values[-1], expected[:3], rtol=1e-6)
    assert result.ratios[-1] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(np.asarray(flat[path], float)))
    shares = expected[:3] / expected[:3].sum()
    assert result.effective_ranks()[-1] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    merged = jax.jit(lora.materialize)(params, adapters)
    full = weight_updates.difference(params, merged, count=5)
    assert full.paths == tuple(sorted(result.paths, key=list(flat).index)) and full.values.shape[1] == 5
    np.testing.assert_allclose(full.values[full.paths.index(path)][:3], expected[:3], rtol=1e-3)
    with pytest.raises(UserError, match="no matrix differs"):
        weight_updates.difference(params, params)


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_variants_without_an_update_have_no_singular_values(loaded, tiny, variant):
    _, params, _ = loaded
    config = dataclasses.replace(tiny.lora, rank=2, variant=variant, targets=(r"layers/\d+/attention/query",))
    result = weight_updates.adapters(params, lora.init(jax.random.key(0), trees.unstack(params), config))
    assert result.paths == ("layers/0/attention/query", "layers/1/attention/query")
    assert np.all(result.values < 1e-5)


def test_parameters_are_counted_with_their_kinds_and_bytes(loaded):
    _, params, _ = loaded
    flat = trees.flatten(params)
    table = llm_jax.show.parameters(params)
    assert table.num_parameters == sum(w.size for w in flat.values())
    assert table.num_bytes == sum(w.nbytes for w in flat.values()) == sum(row[3] for row in table.rows)
    row = next(row for row in table.rows if row[0] == "layers/*/mlp/down")
    assert row[1:] == (2, "float32[2, 48, 32]", 2 * 48 * 32 * 4, "1 device")
    per_layer = llm_jax.show.parameters(trees.unstack(params))
    assert [r[:2] for r in per_layer.rows] == [r[:2] for r in table.rows] and per_layer.num_bytes == table.num_bytes


def test_weights_of_every_kind_are_one_line_with_kinds_shapes_and_dtypes():
    q = weights.to_qtensor(jnp.ones((64, 32)), "int8", weights.IN)
    adapted = weights.Adapted(q, jnp.ones((64, 4)), jnp.ones((4, 32)), jnp.float32(2))
    assert repr(q) == "QTensor(codes=int8[64, 32], scale=float32[1, 32], scheme='int8', axis=-2)"
    assert repr(adapted) == f"Adapted(base={q!r}, a=float32[64, 4], b=float32[4, 32], scale=float32[])"
    assert repr(weights.InputDropout(q, jax.random.key(0), 0.5)).endswith(", key=key<fry>[], rate=0.5)")
    assert "\n" not in repr(weights.Decomposed(adapted, jnp.ones(32), jnp.ones(32)))
    assert "codes=P" in repr(q.partition(jax.sharding.PartitionSpec("data", None))).replace("PartitionSpec", "P")


def test_treescope_displays_the_sizes_of_weights():
    import treescope  # Flax requires it

    q = weights.to_qtensor(jnp.ones((64, 32)), "int8", weights.IN)
    text = treescope.render_to_text({"kernel": q})
    assert "QTensor(" in text and "# (64, 32), 2,176 bytes" in text and "scheme='int8'" in text
    assert "2,176 bytes" in treescope.render_to_html(q, compressed=False)


def test_functions_of_show_are_those_of_the_rooms(trained):
    assert checkpoints.load is llm_jax.load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llm_jax.show.nothing  # noqa: B018
