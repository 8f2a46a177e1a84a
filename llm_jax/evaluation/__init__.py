"""Evaluation of models.

tasks           tasks: examples, templates and a metric, from a JSONL file; `builtin` has three tasks
templates       examples as text: paraphrases and prompting styles, as data
prompts         `PromptConfig`, and the prompts of a task as token ids
answers         the answers of a model to a task, their scores, and a resumable log
classification  accuracy on labelled examples (`data.kind=labelled`)
held_out        loss, perplexity and bits per byte on held-out text
paired          paired differences of several models on the same documents or examples, with intervals
harness         the tasks of EleutherAI's lm-eval
"""
