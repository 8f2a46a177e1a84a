"""Continues a prompt: `python -m llm_jax.generate --checkpoint=runs/x --prompt="def "`.

`llm_jax.decoding.complete.complete` does the same in Python.
"""

import dataclasses
import json

from llm_jax import cli, runtime
from llm_jax.cli import decoding_flags, status
from llm_jax.decoding import options as decoding
from llm_jax.decoding.options import PROMPT
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.define_checkpoint()
FLAGS.multi_string("prompt", None, "text to continue; may be repeated", required=True)
FLAGS.boolean("chat", False, "format the prompt as a user message with the chat template; print only the answer")
FLAGS.string("system", "", "with --chat: system message")
FLAGS.string(
    "chat_template", "", "with --chat: name of a chat template of the tokenizer; default: the template named default"
)
FLAGS.define_dtype()
FLAGS.define_as_stored()
FLAGS.define_activations()
FLAGS.define_mesh()
FLAGS.enum(
    "cache",
    "",
    ["", "compute", "int8"],
    "format of the key-value cache: compute (the compute dtype) or int8; default: model.kv_cache of the checkpoint",
)
FLAGS.boolean("stream", False, "print the text token by token while it is generated (one prompt only)")
FLAGS.boolean("explain", False, "print the candidates of every token and what each filter removed (one prompt only)")
FLAGS.boolean("json", False, "print one JSON object per continuation, with the log-probability of every token")


decoding_flags.define(FLAGS)
NEEDS: cli.Needs = (
    *decoding.NEEDS,
    *cli.MESH_NEEDS,
    (("system", "chat_template"), "--chat is not given", lambda f: f.chat),
    (("alternatives",), "--json is not given", lambda f: f.json),
    (("stop",), "--explain is given", lambda f: not f.explain),
)


def main(f: cli.Flags) -> None:
    runtime.retain_freed_memory()
    runtime.simulate_devices(f.devices)
    status.show(f"loading {f.checkpoint}")
    from llm_jax import checkpoints, tokenizers
    from llm_jax.decoding import complete, explain
    from llm_jax.tokenizers import chat_template
    from llm_jax.tokenizers.base import digest

    checkpoint = checkpoints.open(f.checkpoint, f.base)
    options = decoding_flags.read(f, checkpoint)
    if f.stream + f.explain + f.json > 1:
        raise UserError("--stream, --explain and --json are different output formats; use only one")
    if (f.stream or f.explain) and (len(f.prompt) > 1 or options.n > 1):
        raise UserError(f"--{'stream' if f.stream else 'explain'} shows one continuation of one --prompt")
    model, params, tokenizer = checkpoint.load(
        dtype=f.dtype, as_stored=f.as_stored, activations=f.activations, mesh=f.mesh
    )
    if f.cache:
        model = model.clone(config=dataclasses.replace(model.config, kv_cache=f.cache))
    if not model.config.causal:
        raise UserError(f"{f.checkpoint} is a bidirectional model (model.causal=False); it does not continue text")
    options.check(min(tokenizer.vocab_size, model.config.vocab_size))
    draft = None
    if options.draft not in ("", PROMPT):
        draft_model = checkpoints.load(options.draft, dtype=f.dtype, mesh=f.mesh)
        if digest(draft_model.tokenizer) != digest(tokenizer):
            raise UserError(f"--draft={options.draft} has another tokenizer than {f.checkpoint}")
        draft = draft_model.model, draft_model.params
    if f.chat:
        if not isinstance(tokenizer, tokenizers.PretrainedTokenizer):
            raise UserError(f"--chat needs a tokenizer with a chat template; this checkpoint's is {tokenizer.kind}")
        chat_tokenizer = tokenizers.with_chat_template(tokenizer, f.chat_template)
        system = [{"role": "system", "content": f.system}] if f.system else []
        conversations = [[*system, {"role": "user", "content": text}] for text in f.prompt]
        prompts = [chat_template.apply_chat_template(chat_tokenizer, messages, True) for messages in conversations]
    else:
        prompts = [tokenizers.prompt(tokenizer, text) for text in f.prompt]
        complete.note_unknown(tokenizer, f.prompt)
        complete.note_special(tokenizer, f.prompt)
    status.show("compiling, or loading compiled functions from the cache")
    if f.explain:
        ids = complete.fit_to_context(model, complete.prompt_ids(tokenizer, prompts[0]), options)
        complete.note_length(model, [ids], options)
        eos = complete.eos_ids(tokenizer, options)
        vocab = min(tokenizer.vocab_size, model.config.vocab_size)
        steps = explain.explain(model, params, ids, options, seed=options.seed, eos=eos, vocab_size=vocab)
        for number, step in enumerate(steps, 1):
            status.show("")
            print(explain.table(tokenizer, number, step), flush=True)
        return
    prompt_texts = [] if f.chat else [tokenizer.decode(prompt) for prompt in prompts]
    first_prompt = iter(prompt_texts)  # printed only with the first generated text, after all checks have passed

    def show(row: int, text: str) -> None:
        status.show("")
        print(next(first_prompt, "") + text, end="", flush=True)

    completions = complete.complete(
        model, params, tokenizer, prompts, options, draft=draft, show=show if f.stream else None
    )
    status.show("")
    if f.stream:
        print(next(first_prompt, ""))
        return
    for i, prompt_completions in enumerate(completions):
        for j, completion in enumerate(prompt_completions):
            if f.json:
                record = {
                    "prompt": f.prompt[i],
                    "text": completion.text,
                    "score": completion.score,
                    **dataclasses.asdict(completion.generated),
                }
                print(json.dumps(record))
                continue
            if i or j:
                print("-" * 40)
            print("".join(prompt_texts[i : i + 1]) + completion.text)


COMMAND = cli.Command(
    "generate",
    main,
    FLAGS,
    needs=NEEDS,
    compiles=True,
    memory_hint="use fewer prompts, a smaller --n or --max_new_tokens, --cache=int8, --dtype=bfloat16, or --as_stored",
)

if __name__ == "__main__":
    cli.start(COMMAND)
