"""Statements that textbooks make, and what the experiments here found: writes the table of README.md beside this file.

PYTHONPATH=. python experiments/verdicts.py

The verdicts are those of every results.json; several findings about one statement are all shown.
"""

import pathlib

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.research import findings
from llm_jax.research.findings import Finding

HERE = pathlib.Path(__file__).parent

STATEMENTS = {
    "T1": "Word, subword and character tokens trade vocabulary against length.",
    "T2": "One vocabulary is made once, and then fixed for pretraining and fine-tuning.",
    "T3": "Subword pieces handle words that the vocabulary lacks.",
    "E1": "Dense vectors capture similarity, one-hot vectors cannot.",
    "E2": "word2vec and GloVe learn them from co-occurrence.",
    "E3": "cat is closer to mat than to sat.",
    "E4": "king and queen are close.",
    "E5": "A contextual vector depends on the sentence: the bank of a river, the bank that lends.",
    "P2": "Positions are added to embeddings, or concatenated.",
    "P4": "Absolute encodings fail past the trained length, relative ones do not.",
    "P5": "Relative encodings change keys and values.",
    "P7": "RoPE generalizes to longer sequences.",
    "P8": "Absolute encodings do not know how tokens relate, relative ones do.",
    "Q1": "Weights and activations go from 32 to 8 bits after training with little loss.",
    "Q1b": "These formats lose no more than ggml's of equal size.",
    "Q2": "Training with quantization in the loop ends better than quantizing afterwards.",
    "Q3": "A quantized model is smaller, faster and needs less memory.",
    "L1": "LoRA trains a small part of the parameters and matches full fine-tuning.",
    "L4": "Folding the low-rank product into the weight costs nothing and changes no output.",
    "L5": "Starting from the weight's own low-rank part (PiSSA) is better than from zero.",
    "L6": "Full updating takes about three times the memory of the forward pass.",
    "L7": "LoRA still stores large input activations.",
    "L8": "Low-rank factors may be rounded to 8 bits in every use (the trained masters stay float32).",
    "L9": "QLoRA over an NF4 base loses nothing.",
    "L10": "Fine-tuning a pretrained model beats prompting it, for sentiment.",
    "L11": "LoRA serves other architectures too.",
    "L12": "With A (d, r) and B (r, d) the update is A B; B A would be (r, r).",
    "L13": "QLoRA makes inference faster and saves power.",
    "L14": "An encoder is fine-tuned for sentiment with its own tokenizer.",
    "D2": "Greedy decoding is repetitive, and only locally optimal.",
    "D3": "Cross-entropy with softmax makes unlikely tokens too likely.",
    "D4": "A fixed k leaves good choices out.",
    "D5": "The nucleus covers a mass p with a k that changes.",
    "D6": "The loss causes repetition and heavy tail; it grows exponentially for linearly lower scores.",
    "M1": "Models are highly sensitive to the prompt.",
    "M2": "Zero-shot, few-shot, expert and chain-of-thought prompts differ.",
    "M3": "Asking for steps gives longer outputs.",
    "M4": "Chain of thought pays for large models.",
    "W1": "With μP the best learning rate of a narrow model is the best of wider ones; without it is not.",
    "R1": "A run that is killed and started again ends as an undisturbed one.",
    "R2": "A damaged checkpoint is detected before it is restored.",
    "R3": "A full disk damages no earlier checkpoint.",
    "R4": "A run of several processes that loses one and is started again ends as an undisturbed one.",
    "R5": "A run goes on after its disk was read-only for a while.",
}


def table(directory: pathlib.Path) -> list[str]:
    """The lines of a table of all statements, with what the results.json of every experiment says."""
    by_statement: dict[str, list[tuple[Finding, str]]] = {name: [] for name in STATEMENTS}
    for path in sorted(directory.glob("*/results.json")):
        for result in findings.read(path):
            if result.statement not in by_statement:
                raise UserError(f"{path}: statement {result.statement} is not in STATEMENTS of verdicts.py")
            by_statement[result.statement].append((result, path.parent.name))
    lines = ["| | statement | measured | verdict | in |", "|---|---|---|---|---|"]
    for name, statement in STATEMENTS.items():
        for result, experiment in by_statement[name]:
            measure = f"{result.part} ({result.measure})" if result.part else result.measure
            link = f"[{experiment}]({experiment}/README.md)"
            lines.append(f"| {name} | {statement} | {measure} | **{result.verdict}** | {link} |")
        if not by_statement[name]:
            lines.append(f"| {name} | {statement} |  | **not measured yet** |  |")
    return lines


def main() -> None:
    findings.replace_section(HERE / "README.md", "verdicts", table(HERE))
    print(f"the table of {len(STATEMENTS)} statements is in {HERE / 'README.md'}")


if __name__ == "__main__":
    cli.run_script(main)
