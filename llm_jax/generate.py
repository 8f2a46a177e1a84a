"""Continues a prompt: `python -m llm_jax.generate --checkpoint=runs/x --prompt="def "`."""

from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError

flags.DEFINE_string(
    "checkpoint", None, "a run, a Hugging Face directory, a .gguf file, asset:NAME or hf:ORG/NAME", required=True
)
flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times", required=True)
flags.DEFINE_boolean("chat", False, "ask through the model's chat template; the answer alone is printed")
flags.DEFINE_string("system", "", "with --chat: the system message")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of other people's checkpoints")
flags.DEFINE_integer("max_new_tokens", 128, "tokens at most")
flags.DEFINE_float("temperature", 0.8, "0 is greedy")
flags.DEFINE_integer("top_k", 0, "draw from the k most likely tokens; 0: all")
flags.DEFINE_float("top_p", None, "draw from the most likely tokens of this total probability")
flags.DEFINE_integer("seed", 0, "of the draws; row i uses seed + i")


def main() -> None:
    from llm_jax import pretrained, tokenizers
    from llm_jax.decoding import loop, samplers
    from llm_jax.prompting import chat

    f = flags.FLAGS
    if f.seed < 0:
        raise UserError(f"--seed={f.seed}; expected a number from 0")
    sampler = samplers.make(f.temperature, f.top_k, 1.0 if f.top_p is None else f.top_p)
    model, params, tokenizer = pretrained.load(f.checkpoint, dtype=f.dtype)
    if not model.config.causal:
        raise UserError(f"{f.checkpoint} is a bidirectional model (model.causal=False); it does not continue text")
    if f.chat:
        if not isinstance(tokenizer, tokenizers.Foreign):
            raise UserError(f"--chat needs a tokenizer with a chat template; this checkpoint's is {tokenizer.kind}")
        system = [{"role": "system", "content": f.system}] if f.system else []
        texts = [chat.render(tokenizer.special, [*system, {"role": "user", "content": text}]) for text in f.prompt]
        prompts = [tokenizer.encode_chat(text) for text in texts]
    else:
        prompts = [tokenizers.prompt(tokenizer, text) for text in f.prompt]
    if any(i >= model.config.vocab_size for prompt in prompts for i in prompt):
        raise UserError(f"the prompt has a token that the model lacks (its ids end at {model.config.vocab_size - 1})")
    seeds = [f.seed + i for i in range(len(prompts))]
    made = loop.generate(
        model,
        params,
        prompts,
        sampler,
        max_new_tokens=f.max_new_tokens,
        seeds=seeds,
        eos=tokenizer.eos,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    for i, (prompt, one) in enumerate(zip(prompts, made, strict=True)):
        if i:
            print("-" * 40)
        print(tokenizer.decode(one.ids if f.chat else prompt + one.ids))


if __name__ == "__main__":
    cli.run(main)
