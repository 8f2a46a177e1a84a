import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llm_jax.data import wiki
from llm_jax.embeddings import measure, vectors
from llm_jax.embeddings.vectors import WordVectors
from llm_jax.errors import UserError
from llm_jax.pictures import word_maps

DRAW = np.random.default_rng(0)
FOUND = WordVectors(("the", "größe", "🦜", "cat's"), DRAW.normal(size=(4, 5)).astype(np.float32))


@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    words=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1), min_size=1, max_size=9, unique=True
    ),
    seed=st.integers(0, 99),
)
def test_text_and_binary_format_are_exact_round_trips(tmp_path, name, words, seed):
    words = [w for w in words if not any(c.isspace() for c in w)] or ["a"]
    matrix = np.random.default_rng(seed).normal(size=(len(words), 3)).astype(np.float32)
    vectors.save(WordVectors(tuple(words), matrix), tmp_path / name)
    again = vectors.load(tmp_path / name)
    assert again.words == tuple(words)
    np.testing.assert_array_equal(again.matrix, matrix)


@pytest.mark.parametrize("content", [b"", b"2 3\na 1 2 3\n", b"1 3\na 1 2\n", b"x y\n", b"1 2\na 1 b\n", b"9" * 99])
@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
def test_files_of_other_formats_are_one_line_errors(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="not word vectors in word2vec's"):
        vectors.load(tmp_path / name)


LINES = {  # how other software writes text
    "word2vec": "3 2\nthe 1 2.5 \ncat -1 0 \n</s> 3e-2 4 \n",
    "fasttext": "3 2\nthe 1 2.5 \ncat -1 0 \n</s> 0.03 4 \n",
    "glove": "the 1 2.5\ncat -1 0\n</s> 0.03 4\n",
    "windows": "3 2\r\nthe 1 2.5\r\ncat -1 0 \r\n</s> 0.03 4",
}


@pytest.mark.parametrize("writer", LINES)
def test_text_of_other_software_is_read(tmp_path, writer):
    (tmp_path / "v.vec").write_text(LINES[writer])
    read = vectors.load(tmp_path / "v.vec")
    assert read.words == ("the", "cat", "</s>")
    np.testing.assert_array_equal(read.matrix, np.array([[1, 2.5], [-1, 0], [0.03, 4]], np.float32))


def test_words_of_glove_may_contain_spaces(tmp_path):
    (tmp_path / "v.txt").write_text("the 1 2 3\n. . 4 5 6\nat a@b.c 7 8 9\n")
    assert vectors.load(tmp_path / "v.txt").words == ("the", ". .", "at a@b.c")


NOT_UTF8 = b"caf\xe9\xe9"


def files_not_utf8(directory) -> list:
    """A text file, one without header, and a binary file with a word that is not UTF-8."""
    rows = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    text = b"".join(word + b" %d %d %d\n" % tuple(row) for word, row in zip((b"the", NOT_UTF8), rows, strict=True))
    binary = b"".join(word + b" " + row.tobytes() for word, row in zip((b"the", NOT_UTF8), rows, strict=True))
    contents = {"v.txt": b"2 3\n" + text, "glove.txt": text, "v.bin": b"2 3\n" + binary}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in contents]


@pytest.mark.parametrize(("errors", "word"), [("replace", "caf\ufffd\ufffd"), ("ignore", "caf")])
def test_bytes_that_are_not_utf8(tmp_path, errors, word, command):
    for path in files_not_utf8(tmp_path):
        with pytest.raises(UserError, match=r"caf.xe9.xe9' is not UTF-8; expected UTF-8, or --encoding_errors=replace"):
            vectors.load(path)
        read = vectors.load(path, errors)
        assert read.words == ("the", word) and read[word].tolist() == [4, 5, 6]
    flags = (f"--vectors={path}", "--neighbours=the", "--count=1")
    assert f"{word} " in command("probe_embeddings", *flags, f"--encoding_errors={errors}").stdout
    assert "is not UTF-8" in command("probe_embeddings", *flags, code=2).stderr


@pytest.mark.live
@pytest.mark.parametrize("errors", ["replace", "ignore"])
def test_gensim_reads_the_same(tmp_path, errors):
    import gensim

    for name, text in LINES.items():
        (tmp_path / name).write_text(text)
    for path in [*files_not_utf8(tmp_path), *(tmp_path / name for name in LINES)]:
        theirs = gensim.models.KeyedVectors.load_word2vec_format(
            str(path), binary=path.suffix == ".bin", no_header="glove" in path.name, unicode_errors=errors
        )
        ours = vectors.load(path, errors)
        assert tuple(theirs.index_to_key) == ours.words
        np.testing.assert_array_equal(theirs.vectors, ours.matrix)


def test_words_with_spaces_are_refused(tmp_path):
    with pytest.raises(UserError, match="a space ends a word"):
        vectors.save(WordVectors(("a b",), np.ones((1, 2), np.float32)), tmp_path / "v.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.live
@pytest.mark.parametrize("name", ["v.txt", "v.bin"])
def test_gensim_reads_both_forms(tmp_path, name):
    import gensim

    vectors.save(FOUND, tmp_path / name)
    theirs = gensim.models.KeyedVectors.load_word2vec_format(str(tmp_path / name), binary=name.endswith("bin"))
    assert tuple(theirs.index_to_key) == FOUND.words
    np.testing.assert_array_equal(theirs.vectors, FOUND.matrix)
    theirs.save_word2vec_format(str(tmp_path / f"again-{name}"), binary=name.endswith("bin"))
    np.testing.assert_allclose(vectors.load(tmp_path / f"again-{name}").matrix, FOUND.matrix, rtol=1e-6)


def test_neighbours_and_analogies_are_by_cosine():
    found = WordVectors(
        ("man", "king", "woman", "queen", "far"),
        np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, -9]], np.float32),
    )
    assert [w for w, _ in measure.neighbours(found, "king", 4)] == ["man", "queen", "woman", "far"]
    assert measure.analogy(found, "man", "king", "woman", 1)[0][0] == "queen"
    assert measure.cosine(found, "king", "queen") == pytest.approx(0.5)
    with pytest.raises(UserError, match="'duke' is not among the 5 words"):
        measure.neighbours(found, "duke")


def test_analogies_count_the_questions_whose_words_are_known(tmp_path):
    found = WordVectors(
        ("man", "king", "woman", "queen"), np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1]], np.float32)
    )
    path = tmp_path / "q.txt"
    path.write_text(": royal\nman king woman queen\nMan King woman duke\n: wrong\nman woman king man\n")
    assert measure.analogies(found, path) == {"royal": (1, 1), "wrong": (0, 1)}
    path.write_text("man king woman\n")
    with pytest.raises(UserError, match="expected four words"):
        measure.analogies(found, path)


def test_agreement_is_spearmans(tmp_path):
    found = WordVectors(("a", "b", "c", "d"), np.array([[1, 0], [1, 0.1], [1, 1], [-1, 0]], np.float32))
    path = tmp_path / "pairs.tsv"
    path.write_text("# comment\na\tb\t9.5\na\tc\t5\nA\td\t1\na\tmissing\t3\n")
    said = measure.agreement(found, path)
    assert (said.correlation, said.pairs, said.of) == (pytest.approx(1.0), 3, 4)
    assert np.isnan(measure.agreement(WordVectors(("a",), np.ones((1, 2), np.float32)), path).correlation)


@hypothesis.settings(max_examples=50)
@hypothesis.given(values=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_with_ties_is_the_correlation_of_mean_ranks(values):
    def ranks(x):
        return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]

    x, y = zip(*values, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(measure.spearman(x, y))
    else:
        assert measure.spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])


def test_one_hot_vectors_have_no_correlation_with_ratings(tmp_path):
    """E1: all cosines of different words are 0, so no correlation is there."""
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\t9\na\tc\t5\nb\tc\t1\n")
    found = WordVectors(("a", "b", "c"), np.eye(3, dtype=np.float32))
    assert np.isnan(measure.agreement(found, path).correlation) and measure.cosine(found, "a", "b") == 0


def test_project_to_plane_keeps_the_principal_components():
    matrix = np.array([[1, 0.05, 0], [-1, 0, 0.05], [0, 1, 0], [0, -1, 0]], np.float32)
    places = word_maps.project_to_plane(WordVectors(("a", "b", "c", "d"), matrix), ["a", "b", "c", "d"])
    assert np.linalg.norm(places[0] - places[1]) == pytest.approx(2, abs=0.01)
    assert np.linalg.norm(places[2] - places[3]) == pytest.approx(2, abs=0.01)


MARKUP = """{{Infobox|a={{nested|x}}}}'''Bold''' [[link]] and [[target|shown]].<ref name="a">cite [[b]]</ref>
<ref name=b/>
== Heading ==
* a list
{| class="x"
| cell
|}
[[File:a.jpg|thumb|A [[caption]]]]A &amp; B <!-- not this --> see [http://x.org the page]. [[Category:Words]]"""


def test_markup_becomes_running_text():
    assert wiki.plain_text(MARKUP) == "Bold link and shown.\nA & B  see the page."


def test_a_dump_gives_articles_and_no_redirects(tmp_path):
    page = "<page><title>t</title><ns>{}</ns><revision><text>{}</text></revision></page>"
    path = tmp_path / "wiki.xml"
    path.write_text(
        '<mediawiki xmlns="http://x/">'
        + page.format(0, "One [[two]]")
        + page.format(1, "talk")
        + page.format(0, "#REDIRECT [[One]]")
        + "</mediawiki>"
    )
    assert list(wiki.articles(path)) == ["One two"]
    path.write_text("<mediawiki><page>")
    with pytest.raises(UserError, match="cannot be read as a Wikipedia dump"):
        list(wiki.articles(path))
