"""Writes beam_golden/: a tiny model, and the beams that transformers finds with it.

pip install torch transformers && python tests/decoding/make_beam_golden.py
"""

import itertools
import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).with_name("beam_golden")
VOCAB, EOS, LIMIT, LONG = 6, 1, 5, 16
PROMPTS = ([2], [3, 4, 0], [5, 5, 2, 4])


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(HERE)
    (HERE / "generation_config.json").unlink(missing_ok=True)
    settings = itertools.product((2, 3, 5), (-1.0, 0.0, 1.0, 2.0), (False, True, "never"))
    cases = [case(model, *setting, list(prompt), LIMIT) for setting in settings for prompt in PROMPTS]
    # Longer texts, of prompts for which "never" gives other texts than False.
    for beams, penalty in itertools.product((2, 3), (1.0, 2.0)):
        separating = 0
        for prompt in itertools.product(range(VOCAB), repeat=2):
            pair = [case(model, beams, penalty, early, list(prompt), LONG) for early in (False, "never")]
            if pair[0]["texts"] != pair[1]["texts"] and separating < 2:
                cases += pair
                separating += 1
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "cases.json").write_text(f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}\n')


def case(
    model: torch.nn.Module, beams: int, penalty: float, early: bool | str, prompt: list[int], limit: int
) -> dict[str, object]:
    """The options of a search, its texts and their scores."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=limit,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        early_stopping=early,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = [row[len(prompt) :].tolist() for row in out.sequences]
    texts = [text[: text.index(EOS) + 1] if EOS in text else text for text in texts]
    scores = out.sequences_scores.tolist()
    ranked = [(t, s) for t, s in zip(texts, scores, strict=True) if s > -1e8]
    return {
        "beams": beams,
        "length_penalty": penalty,
        "early_stop": early,
        "limit": limit,
        "prompt": prompt,
        "texts": [t for t, _ in ranked],
        "scores": [round(s, 6) for _, s in ranked],
    }


if __name__ == "__main__":
    main()
