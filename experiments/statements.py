"""The statements about language models that textbooks make, and how a picture shows what was measured about each."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Picture:
    """Estimates of a finding on one axis, beside the thresholds of its rule.

    Attributes:
      conditions: regular expression; the picture has the estimates whose whole condition matches.
      thresholds: the values that the rule compares these estimates with.
      holds: how estimates lie to the thresholds where the statement holds, such as "above"; "" without a threshold.
      title: what the axis is; "": the measure of the finding.
      log: whether the axis is logarithmic.
    """

    conditions: str = ".*"
    thresholds: tuple[float, ...] = ()
    holds: str = ""
    title: str = ""
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement and what is known about it besides the findings of `results.json`.

    Attributes:
      text: the statement, one sentence.
      pictures: each finding about the statement is shown by those that match one of its conditions.
      published: figures of the literature, with their source.
      tests: where tests hold the statement instead of an experiment: a file and an expression for `pytest -k`.
    """

    text: str
    pictures: tuple[Picture, ...] = ()
    published: str = ""
    tests: str = ""


def _above(threshold: float, conditions: str = ".*", title: str = "") -> Picture:
    return Picture(conditions, (threshold,), "above", title)


def _below(threshold: float, conditions: str = ".*", title: str = "") -> Picture:
    return Picture(conditions, (threshold,), "below", title)


GROUPS = {
    "T": "Tokens",
    "E": "Embeddings",
    "P": "Positions",
    "Q": "Quantization",
    "L": "Adaptation",
    "D": "Decoding",
    "M": "Prompting",
    "W": "Width",
    "R": "Reliability",
}

STATEMENTS = {
    "T1": Statement(
        "Word, subword and character tokens trade vocabulary against length.",
        (
            _above(0, "more than .*", "bits per byte of characters or bytes minus those of a kind of pieces"),
            Picture(".*, 8192", title="tokens a word, vocabulary of 8,192 ids"),
        ),
    ),
    "T2": Statement(
        "One vocabulary is made once, and then fixed for pretraining and fine-tuning.",
        (_above(0, ".* (swapped in|tuned)", "bits per byte minus those with the model's own vocabulary"),),
    ),
    "T3": Statement(
        "Subword pieces handle words that the vocabulary lacks.",
        (_above(0.99),),
    ),
    "T4": Statement(
        '"Tokenization is essential." becomes Tokenization / is / essential / . ; at word level "Fine-tuning" is one '
        "token, pieces split it.",
        tests='tests/tokenizers/test_tokenizers.py -k "t4"',
    ),
    "E1": Statement(
        "Dense vectors capture similarity, one-hot vectors cannot.",
        (_above(0),),
        "GloVe answers 75 % of the analogies on a corpus of 42 billion tokens (Pennington et al. 2014)",
    ),
    "E2": Statement(
        "word2vec and GloVe learn them from co-occurrence.",
        (_above(0, "skipgram|cbow|glove"),),
    ),
    "E3": Statement(
        "cat is closer to mat than to sat.",
        (Picture(".* / cat (mat|sat)", title="cosine"),),
    ),
    "E4": Statement("king and queen are close."),
    "E5": Statement(
        "A contextual vector depends on the sentence: the bank of a river, the bank that lends.",
        (_above(0, ".* / difference", "cosine within a sense minus between senses, by layer"),),
    ),
    "P1": Statement(
        "Self-attention without positions does not see order.",
        tests='tests/model/test_positions.py -k "p1"',
    ),
    "P2": Statement("Positions are added to embeddings, or concatenated.", (_below(0),)),
    "P3": Statement(
        "Sinusoids make a relative offset a linear map.",
        tests='tests/model/test_positions.py -k "p3"',
    ),
    "P4": Statement(
        "Absolute encodings fail past the trained length, relative ones do not.",
        (_below(0.05),),
        "Press et al. 2022, table 3, perplexity at 1,024 (the trained length), 3,024 and 16,024 tokens: sinusoidal "
        "19.3, 96, 453; rotary 19.3, 35.7, 107; T5 18.8, 18.6 (at 3,024); ALiBi 18.7, 17.9, 18.0",
    ),
    "P5": Statement(
        "Relative encodings change keys and values.",
        (_below(0),),
        "Shaw et al. 2018: 1.3 and 0.3 BLEU above sinusoids in two translation tasks",
    ),
    "P6": Statement(
        "RoPE depends on relative position only.",
        tests='tests/model/test_positions.py -k "p6"',
    ),
    "P7": Statement(
        "RoPE generalizes to longer sequences.",
        (_below(0.05),),
        "contradicted without scaling: Press et al. 2022 measure a perplexity of 19.3 at the trained length and 107 "
        "at 16 times that length",
    ),
    "P8": Statement(
        "Absolute encodings do not know how tokens relate, relative ones do.",
        (
            _above(0, ".* - .*", "accuracy of a relative scheme minus that of an absolute one, new places"),
            Picture(".*, new_place", title="accuracy of copying at new places"),
        ),
    ),
    "Q1": Statement(
        "Weights and activations go from 32 to 8 bits after training with little loss.",
        (_below(math.log(1.01)),),
        "LLM.int8, 13 B: perplexity 12.45 and 12.45 (absmax: 19.08). GPTQ, OPT-125M at 4 bits: 27.65 and 31.12 "
        "(rounding: 37.28). AWQ, Llama-2-7B, groups of 128: 5.47 and 5.60",
    ),
    "Q1b": Statement("These formats lose no more than ggml's of equal size.", (_below(0),)),
    "Q2": Statement(
        "Training with quantization in the loop ends better than quantizing afterwards.",
        (_above(0, ".*: gain", "loss of the best method after training minus that in the loop, nats a token"),),
        "torchao: 68 % of the perplexity that Llama-3-8B loses on WikiText is recovered",
    ),
    "Q3": Statement(
        "A quantized model is smaller, faster and needs less memory.",
        (
            _above(0, ".*: log ratio of tokens a second", "log ratio of tokens a second to float32"),
            _below(1, ".*: (bytes|memory) over .*", "ratio to float32"),
        ),
    ),
    "L1": Statement(
        "LoRA trains a small part of the parameters and matches full fine-tuning.",
        (_above(-1, "difference", "accuracy of LoRA minus full fine-tuning, points"),),
        "GPT-3 175B: 10,000 times fewer trained parameters, a third of the memory (Hu et al. 2021)",
    ),
    "L2": Statement(
        "A is Gaussian and B zero, so that the start equals the base.",
        tests='tests/lora/test_adapt.py -k "step_zero or gaussian"',
    ),
    "L3": Statement(
        "The base is frozen; only A and B change.",
        tests='tests/lora/test_step.py -k "base_is_not_touched or dense_gradient"',
    ),
    "L4": Statement(
        "Folding the low-rank product into the weight costs nothing and changes no output.",
        (
            _below(8, ".* / roundings", "difference of the logits in roundings of the dtype"),
            _below(1.05, ".* / merged time", "time of the merged model over that of the plain base"),
        ),
    ),
    "L5": Statement(
        "Starting from the weight's own low-rank part (PiSSA) is better than from zero.",
        (_above(0),),
    ),
    "L6": Statement(
        "Full updating takes about three times the memory of the forward pass.",
        (Picture(".*, remat none", (2.5, 3.5), "between (of full)"),),
    ),
    "L7": Statement(
        "LoRA still stores large input activations.",
        (Picture(".*", (0.8, 0.95), "below both, and fails above both"),),
        "peft on MetaMath: 22.2 GB with LoRA-FA, 22.3 GB with LoRA",
    ),
    "L8": Statement(
        "Low-rank factors may be rounded to 8 bits in every use (the trained masters stay float32).",
        (_above(-1),),
    ),
    "L9": Statement(
        "QLoRA over an NF4 base loses nothing.",
        (_above(-1),),
        "mean perplexity of 4-bit formats (Dettmers et al. 2023): NF4 with double quantization 27.41, FP4 31.07, "
        "int4 34.34",
    ),
    "L10": Statement(
        "Fine-tuning a pretrained model beats prompting it, for sentiment.",
        (Picture(".*", title="accuracy, %"),),
    ),
    "L11": Statement("LoRA serves other architectures too.", (_above(0.5),)),
    "L12": Statement("With A (d, r) and B (r, d) the update is A B; B A would be (r, r)."),
    "L13": Statement("QLoRA makes inference faster and saves power.", (_above(1),)),
    "L14": Statement("An encoder is fine-tuned for sentiment with its own tokenizer.", (_above(0),)),
    "D1": Statement(
        "The probability of a text is the product of its conditionals.",
        tests='tests/decoding/test_loop.py -k "sum_to_the_score"',
    ),
    "D2": Statement(
        "Greedy decoding is repetitive, and only locally optimal.",
        (
            Picture("greedy|human|sampling|beam 4|nucleus 0.95", title="texts that end in a loop, %"),
            _above(0, "beam - greedy", "log-probability of the beam's text minus that of greedy, nats"),
        ),
        "Holtzman et al. 2020, table 1, repetition: greedy 73.7 %, beam search 28.9 %, top-p 0.95 0.36 %, human 0.28 %",
    ),
    "D3": Statement(
        "Cross-entropy with softmax makes unlikely tokens too likely.",
        (_above(0.005),),
    ),
    "D4": Statement(
        "A fixed k leaves good choices out.",
        (
            _above(0.1, "outside", "share of tokens with more than 5 % of the mass outside of the 40 likeliest"),
            _below(0.5, "entropy kept by .*", "share of the entropy kept (judged: 40, temperature 0.7)"),
        ),
    ),
    "D5": Statement(
        "The nucleus covers a mass p with a k that changes.",
        (
            Picture("10 %|median|90 %", title="tokens in the nucleus of 0.95, quantiles", log=True),
            Picture("distance .*", title="distance to the logarithm of the human text's perplexity"),
        ),
    ),
    "D6": Statement(
        "The loss causes repetition and heavy tail; it grows exponentially for linearly lower scores.",
        (
            _below(0, "[^,]*", "excess mass of unlikely tokens minus that of cross-entropy"),
            _below(0, ".*, last 8 tokens", "excess mass of the last 8 tokens minus that of cross-entropy"),
        ),
    ),
    "M1": Statement(
        "Models are highly sensitive to the prompt.",
        (Picture(".*", title="best minus worst accuracy over paraphrases, and the 95 % quantile by chance"),),
    ),
    "M2": Statement(
        "Zero-shot, few-shot, expert and chain-of-thought prompts differ.",
        (_above(0),),
    ),
    "M3": Statement(
        "Asking for steps gives longer outputs.",
        (
            _above(0, "tokens", "tokens with chain of thought minus zero-shot"),
            _above(0, "accuracy in arithmetic", "accuracy with chain of thought minus zero-shot"),
        ),
        "Kojima et al. 2022, MultiArith: 17.7 % and 78.7 %",
    ),
    "M4": Statement(
        "Chain of thought pays for large models.",
        (Picture(".*", (0,), "not above for small models"),),
        "Wei et al. 2022, GSM8K: PaLM 8B 4.9 % and 4.1 %, PaLM 540B 17.9 % and 56.9 %",
    ),
    "W1": Statement(
        "With μP the best learning rate of a narrow model is the best of wider ones; without it is not.",
        (Picture(".*", (0.05,), "below with μP and, at the widest, above without it"),),
        "Yang et al. 2022 (arXiv:2203.03466): rates transfer from 40 M to 6.7 B parameters",
    ),
    "R1": Statement(
        "A run that is killed and started again ends as an undisturbed one.", (Picture("lost", (0,), "at"),)
    ),
    "R2": Statement("A damaged checkpoint is detected before it is restored.", (Picture("lost|missed", (0,), "at"),)),
    "R3": Statement("A full disk damages no earlier checkpoint.", (Picture("lost", (0,), "at"),)),
    "R4": Statement(
        "A run of several processes that loses one and is started again ends as an undisturbed one.",
        tests='tests/parallel/test_processes.py -k "signal_to_one"',
    ),
    "R5": Statement("A run goes on after its disk was read-only for a while.", (Picture("lost", (0,), "at"),)),
}
