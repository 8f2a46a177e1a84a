"""Beam search, contrastive search and speculative decoding, against enumeration, numpy and statistics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax import lora
from llm_jax.decoding import beam, contrastive, loop, samplers, score, speculative, steps
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from tests.lora import cases

VOCAB, EOS, LIMIT = 5, 1, 4
GREEDY = DecodingOptions(temperature=0).sampler()


@pytest.fixture(scope="module")
def small(make):
    """A model whose texts of up to four tokens can all be listed; its weights are large, so that tokens differ."""
    model, params = make(vocab_size=VOCAB, scan_layers=False, num_layers=1)
    return model, jax.tree.map(lambda x: 4.0 * x, params)


def all_texts():
    """Every text that ends with EOS or has four tokens."""
    for n in range(1, LIMIT + 1):
        for text in itertools.product(range(VOCAB), repeat=n):
            if EOS not in text[:-1] and (text[-1] == EOS or n == LIMIT):
                yield text


def ranking(small, prompt, power):
    model, params = small
    texts = list(all_texts())
    sums = [sum(s.log_probabilities) for s in score.score(model, params, [(prompt, t) for t in texts], 64)]
    return sorted(((s / len(t) ** power, t) for s, t in zip(sums, texts, strict=True)), reverse=True)


def texts_of(beams, eos=EOS):
    return [(*b.generated.ids, eos) if b.generated.stop == "eos" else tuple(b.generated.ids) for b in beams]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, -1.0])
def test_a_wide_beam_finds_the_true_best_of_all_texts(small, power):
    prompts = [[2], [3, 4, 0, 2, 2], [0, 0]]
    options = DecodingOptions(beams=VOCAB**3, n=5, length_penalty=power, early_stop="never", max_new_tokens=LIMIT)
    for prompt, beams in zip(prompts, beam.search(*small, prompts, options, eos=EOS), strict=True):
        best = ranking(small, prompt, power)[:5]
        assert texts_of(beams) == [t for _, t in best]
        np.testing.assert_allclose([b.score for b in beams], [s for s, _ in best], atol=1e-4)
        for b, text in zip(beams, texts_of(beams), strict=True):
            assert len(b.generated.log_probabilities) == len(text)
            np.testing.assert_allclose(sum(b.generated.log_probabilities), b.score * len(text) ** power, atol=1e-4)


def test_a_narrow_beam_is_that_of_a_plain_loop(small):
    """With penalty 0, against a search written with lists."""
    model, params = small
    for prompt, beams in zip(
        [[2], [3, 4, 0]], beam.search(*small, [[2], [3, 4, 0]], DecodingOptions(beams=2, n=2, length_penalty=0.0,
        max_new_tokens=LIMIT), eos=EOS), strict=True,
    ):  # fmt: skip
        running, ended = [(0.0, ())], []
        for _ in range(LIMIT):
            grown = []
            for _, text in running:
                one = [score.score(model, params, [(prompt, (*text, v))], 1)[0] for v in range(VOCAB)]
                grown += [(sum(s.log_probabilities), (*text, v)) for v, s in enumerate(one)]
            grown.sort(reverse=True)
            ended += [g for g in grown if g[1][-1] == EOS]
            running = [g for g in grown if g[1][-1] != EOS][:2]
        expected = sorted(ended + running, reverse=True)[:2]
        assert texts_of(beams) == [t for _, t in expected]


def test_groups_with_a_diversity_penalty_differ(small):
    same = DecodingOptions(beams=4, n=4, beam_groups=2, max_new_tokens=LIMIT)
    apart = DecodingOptions(beams=4, n=4, beam_groups=2, max_new_tokens=LIMIT, diversity=50.0)
    plain = texts_of(beam.search(*small, [[2]], same, eos=None)[0])
    diverse = texts_of(beam.search(*small, [[2]], apart, eos=None)[0])
    assert len(set(plain)) == 2  # without diversity both groups find the same
    first = {t[:1] for t in diverse[:1]}
    assert len({t[0] for t in diverse}) > 1 and len(set(diverse)) == 4, first


def test_early_stop_ends_with_n_texts_and_a_row_does_not_depend_on_its_neighbours(small):
    options = DecodingOptions(beams=3, n=2, early_stop=True, max_new_tokens=LIMIT)
    prompts = [[2], [3, 4, 0, 2], [0], [4, 4]]
    together = beam.search(*small, prompts, options, eos=EOS)
    for prompt, beams in zip(prompts, together, strict=True):
        (alone,) = beam.search(*small, [prompt], options, eos=EOS)
        assert texts_of(alone) == texts_of(beams) and len(beams) <= 2


def test_a_beam_ends_at_a_stop(small):
    def stop(row, ids, checked):
        return len(ids) if ids[-2:] == [3, 3] else None

    options = DecodingOptions(beams=VOCAB**3, n=3, length_penalty=0.0, max_new_tokens=LIMIT)
    (beams,) = beam.search(*small, [[2]], options, eos=None, stop=stop)
    model, params = small
    texts = {
        t[: next((i + 2 for i in range(3) if t[i : i + 2] == (3, 3)), 4)] for t in itertools.product(range(5), repeat=4)
    }
    sums = [sum(s.log_probabilities) for s in score.score(model, params, [((2,), t) for t in sorted(texts)], 64)]
    expected = sorted(zip(sums, sorted(texts), strict=True), reverse=True)[:3]
    assert [tuple(b.generated.ids) for b in beams] == [t for _, t in expected]
    assert {b.generated.stop for b in beams} <= {"stop", "length"}


def test_contrastive_search_is_that_of_the_formula(make):
    model, params = make(scan_layers=False)
    k, alpha, prompts = 4, 0.6, [[5, 9, 5], [7], list(range(20, 60))]
    made = contrastive.search(model, params, prompts, DecodingOptions().sampler(), k=k, alpha=alpha, max_new_tokens=6)
    features = jax.jit(lambda ids: model.apply({"params": params}, ids, method="features")[0])
    logits = jax.jit(lambda x: model.apply({"params": params}, x, method="logits"))

    def unit(ids):
        x = np.asarray(features(jnp.asarray([ids + [0] * (64 - len(ids))])))[0, : len(ids)]
        return x, x / np.linalg.norm(x, axis=-1, keepdims=True)

    for prompt, one in zip(prompts, made, strict=True):
        ids = list(prompt)
        for _ in range(6):
            raw, said = unit(ids)
            probabilities = np.asarray(jax.nn.softmax(logits(raw[-1:])))[0]
            candidates = np.argsort(-probabilities)[:k]
            scores = [(1 - alpha) * probabilities[v] - alpha * (said @ unit([*ids, int(v)])[1][-1]).max()
                      for v in candidates]  # fmt: skip
            ids.append(int(candidates[int(np.argmax(scores))]))
        assert one.ids == ids[len(prompt) :]
    plain = loop.generate(model, params, prompts, GREEDY, max_new_tokens=6)
    no_penalty = contrastive.search(
        model, params, prompts, DecodingOptions().sampler(), k=k, alpha=0.0, max_new_tokens=6
    )
    assert [o.ids for o in no_penalty] == [o.ids for o in plain] != [o.ids for o in made]


def test_rows_with_adapters_of_their_own_are_searched_as_if_alone(make, tiny):
    model, base = make(num_layers=1)
    settings = [cases.config(tiny), cases.config(tiny, rank=2, targets=("attention", "embeddings"))]
    combined = lora.combine(*(cases.made(base, one, seed) for seed, one in enumerate(settings)))
    beams = DecodingOptions(beams=4, n=2, beam_groups=2, diversity=0.5, max_new_tokens=6)

    def found(mixture, prompts):
        params = lora.attach(base, lora.mix(combined, mixture))
        searched = beam.search(model, params, prompts, beams)
        contrasted = contrastive.search(model, params, prompts, GREEDY, k=3, alpha=0.6, max_new_tokens=6)
        return [[*(b.generated.ids for b in row), one.ids] for row, one in zip(searched, contrasted, strict=True)]

    mixtures, prompts = jnp.array([[1.0, 0], [0, 1.0], [0, 0]]), [[1, 5, 9]] * 3
    expected = [found(jnp.stack([mixture] * 3), prompts)[0] for mixture in mixtures]  # three rows: the same programs
    assert found(mixtures, prompts) == expected
    first, second, neither = expected
    for i in range(3):  # each text of each method depends on the adapter
        assert first[i] != neither[i] and second[i] != neither[i] and first[i] != second[i]


@pytest.fixture(scope="module")
def other(make):
    """Another small model, which guesses wrongly often."""
    model, params = make(vocab_size=VOCAB, scan_layers=False, num_layers=2)
    return model, jax.tree.map(lambda x: 3.0 * x, params)


@pytest.fixture(scope="module")
def padded(small, make):
    """{name: `small` with an embedding table of fewer or more rows}, whose rows of common ids are those of `small`."""
    drafts = {}
    for name, size in (("narrower", VOCAB - 2), ("wider", VOCAB + 3)):
        model, params = make(vocab_size=size, scan_layers=False, num_layers=1)
        resize = lambda own, w: w if own.shape == w.shape else own.at[:VOCAB].set(w[: len(own)])  # noqa: E731
        drafts[name] = model, jax.tree.map(resize, params, small[1])
    return drafts


# The test of a padded draft accepts all that is proposed as "the model itself" does.
@pytest.mark.parametrize(
    "who", ["draft", pytest.param("the model itself", marks=pytest.mark.slow), "look-up", "narrower"]
)
def test_speculative_greedy_is_greedy(small, other, padded, who):
    draft = (padded | {"draft": other, "the model itself": small, "look-up": None})[who]
    prompts = [[2], [3, 4, 0, 2, 2, 3, 4], [0] * 35]
    for eos in (None, EOS):
        plain = loop.generate(*small, prompts, GREEDY, max_new_tokens=17, eos=eos)
        guessed = speculative.generate(*small, prompts, GREEDY, draft, 3, max_new_tokens=17, eos=eos)
        for one, same in zip(plain, guessed, strict=True):
            assert (one.ids, one.stop) == (same.ids, same.stop)
            np.testing.assert_allclose(one.log_probabilities, same.log_probabilities, atol=1e-4)


FILTERED = DecodingOptions(top_k=3, temperature=1.5, repetition_penalty=1.3)


@pytest.mark.parametrize(
    ("who", "options"),
    [
        pytest.param("draft", DecodingOptions(), id="draft-plain", marks=pytest.mark.slow),
        pytest.param("draft", FILTERED, id="draft-filtered"),
        pytest.param("look-up", DecodingOptions(), id="look-up-plain", marks=pytest.mark.slow),
        pytest.param("look-up", FILTERED, id="look-up-filtered"),
        pytest.param("narrower", DecodingOptions(), id="narrower-plain"),
        pytest.param("wider", FILTERED, id="wider-filtered", marks=pytest.mark.slow),
    ],
)
def test_speculative_draws_have_the_models_own_distribution(monkeypatch, small, other, padded, who, options):
    """Over all texts of three tokens, for two prompts in one batch: a round of two guesses and one more."""
    monkeypatch.setattr(steps, "_SMALLEST_BUCKET", 8)  # the time is that of attention over slots, most of them empty
    prompts, count = [[2], [3, 4, 0, 2, 3]], 3000
    rows = [p for p in prompts for _ in range(count)]
    made = speculative.generate(
        *small,
        rows,
        options.sampler(),
        (padded | {"draft": other, "look-up": None})[who],
        2,
        max_new_tokens=3,
        eos=None,
    )
    texts = list(itertools.product(range(VOCAB), repeat=3))
    for which, prompt in enumerate(prompts):
        counts = np.zeros(len(texts))
        for one in made[which * count : (which + 1) * count]:
            counts[texts.index(tuple(one.ids))] += 1
        expected = np.exp([step_logs(small, prompt, t, options) for t in texts])
        np.testing.assert_allclose(expected.sum(), 1, atol=1e-4)
        assert counts[expected == 0].sum() == 0
        often = expected * count >= 5
        seen = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], max(expected[~often].sum(), 1e-9)) * count
        assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def step_logs(small, prompt, text, options):
    """log P(text) under the filtered model, by the sampler on logits of the whole forward pass."""
    key = (tuple(prompt), options)
    if key not in _TABLES:
        _TABLES[key] = table_of(small, prompt, options)
    return sum(_TABLES[key][text[:i]][text[i]] for i in range(3))


_TABLES: dict = {}


def table_of(small, prompt, options):
    """For every text of up to two tokens, the log-probabilities of the next."""
    from llm_jax.decoding.samplers import History

    model, params = small
    heads = [t for n in range(3) for t in itertools.product(range(VOCAB), repeat=n)]
    ids = np.zeros((len(heads), len(prompt) + 2), np.int32)
    for row, head in zip(ids, heads, strict=True):
        row[: len(prompt) + len(head)] = [*prompt, *head]
    lengths = np.asarray([len(prompt) + len(h) for h in heads], np.int32)
    logits = np.asarray(jax.jit(lambda ids: model.apply({"params": params}, ids))(ids))[
        np.arange(len(heads)), lengths - 1
    ]
    history = History(jnp.asarray(ids), jnp.asarray(lengths), jnp.full(len(heads), len(prompt), jnp.int32))
    logs = jax.jit(lambda s, x: s.log_probabilities(x, history))(options.sampler(), logits)
    return dict(zip(heads, np.asarray(logs, np.float64), strict=True))


def test_speculative_rows_depend_on_their_seeds_only_and_other_lengths_do_not_compile_again(small, other):
    def call(prompts, seeds, count=9):
        return [o.ids for o in speculative.generate(
            *small, prompts, DecodingOptions().sampler(), other, 3, max_new_tokens=count, seeds=seeds)]  # fmt: skip

    first = call([[2], [3, 4, 0]], [1, 2])
    compiled = speculative._advance.of_model(small[0])._cache_size()
    assert call([[0] * 9, [3, 4, 0]], [7, 2])[1] == first[1] != call([[2], [3, 4, 0]], [1, 3], 5)[1]
    assert speculative._advance.of_model(small[0])._cache_size() == compiled


def test_a_padded_draft_that_equals_the_model_is_accepted(small, padded):
    """Ids that only the padded table has are never drawn, so that the draft proposes what the model says."""
    rounds = []
    made = speculative.generate(
        *small,
        [[2, 3]],
        GREEDY,
        padded["wider"],
        3,
        max_new_tokens=8,
        watch=lambda rows: rounds.append(len(rows[0].ids)),
    )
    assert rounds == [4, 8]
    assert made[0].ids == loop.generate(*small, [[2, 3]], GREEDY, max_new_tokens=8)[0].ids
    logits = np.array([[3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(speculative._resized(logits, 5), [[3, 1, 2, -np.inf, -np.inf]])
    np.testing.assert_array_equal(speculative._resized(logits, 2), [[3, 1]])


def test_scores_of_single_pairs_and_batches_agree_and_say_what_is_greedy(small):
    model, params = small
    pairs = [([2], [3, 4, 0]), ([3, 4, 0, 2], [1]), ([0] * 40, [2, 2])]
    together = score.score(model, params, pairs, 2)
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)))
    for (prompt, answer), one in zip(pairs, together, strict=True):
        logs = np.asarray(forward(jnp.asarray([prompt + answer])))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.log_probabilities, logs[np.arange(len(answer)), answer], atol=1e-4)
        assert one.greedy == (logs.argmax(-1) == answer).all()


def test_d1_step_log_probabilities_sum_to_the_teacher_forced_score(make):
    model, params = make(scan_layers=False)
    prompts = [[5], [7, 8, 9], list(range(20, 60))]
    made = loop.generate(
        model, params, prompts, DecodingOptions(top_p=0.8).sampler(), max_new_tokens=12, seeds=[1, 2, 3]
    )
    scored = score.score(model, params, [(p, one.ids) for p, one in zip(prompts, made, strict=True)])
    for one, whole in zip(made, scored, strict=True):
        np.testing.assert_allclose(sum(one.log_probabilities), sum(whole.log_probabilities), atol=1e-3)


def test_a_bidirectional_model_cannot_score_text(make):
    with pytest.raises(UserError, match="a bidirectional model"):
        score.score(*make(causal=False), [([2], [3])])


def test_prompt_lookup_proposes_the_continuation_of_the_longest_last_match():
    rows = [[1, 2, 9, 1, 2, 7, 4, 1, 2], [5, 1, 2, 8, 3, 1, 2, 7, 5, 1, 2]]
    ids = np.zeros((2, 16), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = jnp.asarray([len(tokens) for tokens in rows])
    proposed = speculative._look_up(samplers.History(jnp.asarray(ids), lengths, lengths), 3)
    assert proposed.tolist() == [[7, 4, 1], [8, 3, 1]]


@pytest.mark.parametrize("diversity", [0.5, 2.0])
def test_groups_are_penalized_as_in_the_paper(small, diversity):
    """Vijayakumar et al. 2016, arXiv:1610.02424, equation 5: groups of one beam each, against a loop."""
    model, params = small
    prompts = [[2], [3, 4, 0], [0], [4, 4, 3]]
    options = DecodingOptions(
        beams=3, n=3, beam_groups=3, diversity=diversity, length_penalty=0.0, max_new_tokens=LIMIT
    )
    for prompt, beams in zip(prompts, beam.search(model, params, prompts, options, eos=None), strict=True):
        groups: list[list[int]] = [[], [], []]
        totals = np.zeros(3)
        for _ in range(LIMIT):
            chosen = np.zeros(VOCAB)
            for group, text in enumerate(groups):
                pairs = [([*prompt, *text], [v]) for v in range(VOCAB)]
                logs = np.array([s.log_probabilities[0] for s in score.score(model, params, pairs, VOCAB)])
                token = int(np.argmax(logs - diversity * chosen))
                text.append(token)
                totals[group] += logs[token]
                chosen[token] += 1
        order = np.argsort(-totals, kind="stable")
        assert sorted(map(tuple, groups)) == sorted(texts_of(beams, None))
        np.testing.assert_allclose([b.score for b in beams], totals[order], atol=1e-4)


def test_contrastive_search_does_not_look_at_padding(make, monkeypatch):
    """Whatever ids fill up a prompt, their features are no tokens of the text."""
    model, params = make(scan_layers=False)
    prompts, original = [[5, 9, 5], [7], list(range(20, 40))], steps.padded

    def search(fill):
        def padded(prompts, params):
            ids, lengths = original(prompts, params)
            return np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, fill).astype(np.int32), lengths

        monkeypatch.setattr(steps, "padded", padded)
        options = {"k": 8, "alpha": 0.95, "max_new_tokens": 6}
        return [row.ids for row in contrastive.search(model, params, prompts, DecodingOptions().sampler(), **options)]

    # Padding that equals what is generated would be most alike to it.
    first = search(0)
    for fill in sorted({index for row in first for index in row})[:6]:
        assert search(fill) == first
