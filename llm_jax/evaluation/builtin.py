"""Built-in tasks: arithmetic, copying, and the sentiment of film reviews (an asset)."""

import pathlib
import random
from collections.abc import Callable

from llm_jax.data import assets
from llm_jax.errors import UserError
from llm_jax.evaluation import tasks
from llm_jax.evaluation.tasks import Task
from llm_jax.evaluation.templates import Example, Template

SHOTS = 16  # solved examples of each task


def _templates(questions: tuple[str, ...], answer: str = " {answer}") -> tuple[Template, ...]:
    return tuple(Template(question, answer) for question in questions)


def arithmetic(count: int = 200) -> Task:
    """Word problems: the sum or difference of two numbers up to 20. The metric compares the number in the answer."""
    draw = random.Random(0)
    people, things = ("Anna", "Ben", "Carla", "David", "Emma"), ("apples", "books", "coins", "pens", "stones")
    examples: list[Example] = []
    while len(examples) < count + SHOTS:
        a, b, gives = draw.randint(2, 20), draw.randint(2, 20), draw.random() < 0.5
        if gives and a < b:
            continue
        who, what = draw.choice(people), draw.choice(things)
        does = f"gives away {b}" if gives else f"gets {b} more"
        result = a - b if gives else a + b
        text = f"{who} has {a} {what} and {does}. How many {what} does {who} have now?"
        why = f"{who} starts with {a} {what} and {does}, so {a} {'-' if gives else '+'} {b} = {result}."
        examples.append(Example({"text": text}, str(result), (), why))
    questions = (
        "Q: {text}\nA:", "Question: {text}\nAnswer:", "{text}\nAnswer:", "Problem: {text}\nSolution:",
        "Solve this problem. {text}\nThe result is", "{text} The answer is", "Exercise: {text}\nResult:",
        "Please work this out: {text}\nAnswer:", "Riddle: {text}\nNumber:", "Here is a question. {text}\nReply:",
    )  # fmt: skip
    return Task(
        "arithmetic", _templates(questions), tuple(examples[SHOTS:]), tuple(examples[:SHOTS]),
        extract="[-\N{MINUS SIGN}]?\\d[\\d,]*", metric="number", max_new_tokens=12, domain="arithmetic",
    )  # fmt: skip


def copying(count: int = 200) -> Task:
    """Repeating three words. The metric is whether the answer starts with them, ignoring case and punctuation."""
    words = "apple river stone cloud table green music paper light horse bread glass tower seven night".split()
    draw = random.Random(1)
    texts = [" ".join(draw.sample(words, 3)) for _ in range(count + SHOTS)]
    examples = [Example({"text": t}, t, (), f"The words are {', '.join(t.split())}.") for t in texts]
    questions = (
        "Repeat: {text}\nRepeated:", "Copy these words: {text}\nCopy:", "Words: {text}\nThe same words:",
        "Input: {text}\nOutput:", "Say again: {text}\nAgain:", "Echo: {text}\nEcho:",
        "Write the following once more: {text}\nOnce more:", "Original: {text}\nDuplicate:",
        "Text: {text}\nText:", "Please repeat after me: {text}\nI repeat:",
    )  # fmt: skip
    return Task(
        "copying", _templates(questions), tuple(examples[SHOTS:]), tuple(examples[:SHOTS]),
        metric="starts", max_new_tokens=16, domain="copying texts", normalization="words",
    )  # fmt: skip


def sentiment(count: int = 200) -> Task:
    """Sentences of film reviews with a rating below -1 or above 1 (of -4 to 4): positive or negative, by likelihood."""
    rows = [line.split("\t") for line in assets.path("movie-reviews").read_text("utf-8").splitlines()]
    texts: dict[str, list[str]] = {"positive": [], "negative": []}
    for _, rating, text in rows:
        if abs(float(rating)) > 1 and 20 < len(text) < 200:
            texts["positive" if float(rating) > 0 else "negative"].append(text.strip())
    draw = random.Random(2)
    choices, half = ("positive", "negative"), (count + SHOTS) // 2
    drawn = [(text, label) for label in choices for text in draw.sample(sorted(texts[label]), half)]
    draw.shuffle(drawn)
    examples = [Example({"text": t}, label, choices, f"The words of the review are {label}.") for t, label in drawn]
    questions = (
        "Review: {text}\nSentiment:", "{text}\nThe sentiment of this review is", "Text: {text}\nLabel:",
        "Is this film review positive or negative? {text}\nAnswer:", "Sentence: {text}\nFeeling:",
        "A critic wrote: {text}\nThe critic's opinion is", "Film review: {text}\nOverall opinion:",
        "Classify as positive or negative: {text}\nClass:", "{text}\nThis review is",
        "Comment: {text}\nTone:",
    )  # fmt: skip
    return Task(
        "sentiment", _templates(questions), tuple(examples[SHOTS:]), tuple(examples[:SHOTS]),
        scoring="likelihood", domain="film criticism",
    )  # fmt: skip


TASKS: dict[str, Callable[[int], Task]] = {"arithmetic": arithmetic, "copying": copying, "sentiment": sentiment}


def load_task(name: str) -> Task:
    """The built-in task with this name, or the task in a file of JSON lines. Raises UserError if there is neither."""
    if name in TASKS:
        return TASKS[name](200)
    if not pathlib.Path(name).is_file():
        raise UserError(f"the task '{name}' is unknown; expected one of {', '.join(TASKS)}, or a JSONL file")
    return tasks.read(pathlib.Path(name))
