"""Chat templates and conversations, held against transformers (make_chat_golden.py)."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{%- generation %}{{ '\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tools": "{% if tools is not none %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% if documents is not none %}documents: {{ documents | length }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson(indent=1) }}</call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
USER, YES = {"role": "user", "content": "hello the cat?"}, {"role": "assistant", "content": "yes no maybe"}
CALL = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "é"}}}]
CONVERSATIONS = {
    "one": {"messages": [USER, YES]},
    "two": {
        "messages": [USER, YES, {"role": "user", "content": "a dog\n  ran"}, {"role": "assistant", "content": "😀 on"}]
    },
    "system": {"messages": [{"role": "system", "content": "be good"}, USER, YES]},
    "called": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "content": "12"},
            YES,
        ],
        "tools": [{"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}],
    },
    "thought": {
        "messages": [USER, YES | {"reasoning_content": "two and two"}],
        "documents": [{"title": "a", "text": "b"}],
    },
}
# (template, conversation), where the template can show it.
PAIRS = [(t, c) for t in TEMPLATES for c in CONVERSATIONS if t == "tools" or c in ("one", "two", "system")]
PAIRS = [pair for pair in PAIRS if pair != ("mistral", "system")]
FORMS = ("prepend", "metaspace", "bytelevel")
