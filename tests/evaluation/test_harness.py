"""Our adapter in EleutherAI's lm-eval harness, on a local task. pip install lm-eval"""

import importlib
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.decoding import score
from llm_jax.evaluation import answers, harness
from llm_jax.evaluation.prompts import PromptConfig
from llm_jax.evaluation.tasks import Task
from llm_jax.evaluation.templates import Example, Template
from llm_jax.tokenizers.byte import ByteTokenizer
from tests.data.test_labelled import TEMPLATE, chat_tokenizer

BYTES = ByteTokenizer()


@given(st.integers(2, 60), st.integers(2, 20))
def test_rolling_windows_predict_every_token_once_with_all_context_there_is(length, context):
    ids = list(range(length))
    windows = harness.rolling_windows(ids, context)
    assert [i for _, tail in windows for i in tail] == ids[1:]
    for head, tail in windows:
        assert head and len(head) + len(tail) <= context and head + tail == ids[head[0] : tail[-1] + 1]
        assert head[0] == 0 or len(head) + len(tail) == context


@pytest.mark.live
def test_lm_eval_gives_the_accuracy_of_our_evaluation(make, tmp_path):
    importlib.import_module("lm_eval")  # a missing peer fails
    model, params = make(scan_layers=False)
    examples = [{"text": t, "gold": i % 2} for i, t in enumerate(("a", "bc", "def", "gh", "the", "x y"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (tmp_path / "letters.yaml").write_text(f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{text}}}}\\nA:"
doc_to_choice: ["yes", "n"]
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    found = harness.run(model, params, BYTES, ["letters"], tmp_path, batch_size=4)["letters"]
    task = Task(
        "letters",
        (Template("Q: {text}\nA:"),),
        tuple(Example({"text": e["text"]}, ("yes", "n")[e["gold"]], ("yes", "n")) for e in examples),
        scoring="likelihood",
    )
    ours = answers.summary(list(answers.records((model, params, BYTES), task, PromptConfig(), range(6), 4)))
    assert found["acc,none"] == ours["accuracy"]


class Request:
    def __init__(self, *args):
        self.args = args


def test_chats_that_lm_eval_renders_have_their_special_tokens(make, monkeypatch):
    model, params = make(scan_layers=False)
    tokenizer = chat_tokenizer(TEMPLATE)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = object  # type: ignore[attr-defined]
    scored: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(
        score, "score", lambda model, params, pairs, size: scored.extend(pairs) or [score.Scored([0.0], True)]
    )
    prompts: list[list[int]] = []
    completion = types.SimpleNamespace(text="written")
    monkeypatch.setattr(harness, "complete", lambda m, p, t, ids, o: prompts.extend(ids) or [[completion]])
    adapter = harness.language_model(model, params, tokenizer, context=300)
    adapter.loglikelihood([Request("<|end|>", "yes")])
    chat = adapter.apply_chat_template([{"role": "user", "content": "2+2?"}])
    assert chat == "<|start|>user: 2+2?<|end|><|start|>assistant: "
    adapter.loglikelihood([Request(chat, "4")])
    adapter.generate_until([Request(chat, {"until": []})])
    special = [tokenizer._tokenizer.token_to_id(name) for name in ("<|start|>", "<|end|>")]
    (plain, _), (head, tail) = scored
    assert not set(plain) & set(special)  # a text that looks like a special token, before any chat
    assert [i for i in head if i in special] == [special[0], special[1], special[0]]
    assert tokenizer._tokenizer.decode([*head, *tail], skip_special_tokens=False) == chat + "4"
    assert prompts == [tokenizer.encode_chat(chat)]


@pytest.mark.live
def test_the_adapter_scores_and_writes(make):
    importlib.import_module("lm_eval")  # a missing peer fails
    model, params = make(scan_layers=False)
    adapter = harness.language_model(model, params, BYTES, batch_size=2, context=16)
    text = "the model reads a token"
    (rolled,) = adapter.loglikelihood_rolling([Request(text)])
    ids = [1, *BYTES.encode(text)]
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)))
    expected = 0.0
    for head, tail in harness.rolling_windows(ids, 16):
        logs = np.asarray(forward(jnp.asarray([head + tail])))[0]
        expected += sum(logs[len(head) - 1 + i, t] for i, t in enumerate(tail))
    assert math.isclose(rolled, expected, abs_tol=1e-3)
    ((log, _),) = adapter.loglikelihood([Request("", "ab")])
    logs = np.asarray(forward(jnp.asarray([[1, *BYTES.encode("ab")]])))[0]
    assert math.isclose(log, logs[0, BYTES.encode("a")[0]] + logs[1, BYTES.encode("b")[0]], abs_tol=1e-3)
    (written,) = adapter.generate_until([Request("ab", {"until": ["zzz"], "max_gen_toks": 5})])
    assert isinstance(written, str) and len(BYTES.encode(written)) <= 15
