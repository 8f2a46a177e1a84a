"""What may change when a run goes on, and what is told of a run that starts from another's weights."""

import pathlib

from llm_jax import checkpoints
from llm_jax.configuration import flat
from llm_jax.errors import UserError
from llm_jax.schema import Config, ModelConfig

# Whole keys, and sections by their dot. Any other difference is another run.
_FREE = (
    *("eval.", "report.", "checkpoint.", "mesh."),
    *("train.steps", "train.on_bad_step", "train.spike_factor", "model.attention_kernel", "model.kv_cache"),
    *("data.cache_dir", "data.workers", "tokenizer.path"),  # the tokenizer itself is compared
)
# About a model, what concerns neither its weights nor what it computes.
_LAYOUT = ("model.scan_layers", "model.remat", "model.vocab_size", "model.attention_kernel", "model.kv_cache")


def refuse_another(workdir: pathlib.Path, config: Config) -> None:
    """Raises UserError where the workdir holds a run of a configuration that differs in what matters."""
    if not (workdir / "config.json").exists():
        return
    before, now = (flat(c) for c in (checkpoints.read_config(workdir), config))
    changed = [k for k in now if now[k] != before[k] and k not in _FREE and f"{k.split('.')[0]}." not in _FREE]
    if not now["model.vocab_size"]:  # 0 means the tokenizer's, which the file names
        changed = [k for k in changed if k != "model.vocab_size"]
    if changed:
        said = "; ".join(f"{k} was {before[k]!r}, now {now[k]!r}" for k in changed[:4])
        raise UserError(f"{workdir} holds another run ({said}); give another --workdir")


def differences(before: ModelConfig, now: ModelConfig) -> list[tuple[str, str]]:
    """What about a model has changed, beside how it is laid out: (key, what it was)."""
    old, new = flat(before, "model."), flat(now, "model.")
    return [(key, repr(old[key])) for key in new if old[key] != new[key] and key not in _LAYOUT]
