"""The options that may change when a run is resumed."""

# Keys, or sections that end with a dot. The hash of a tokenizer is compared instead of its path.
_RESUMABLE = (
    *("eval.", "report.", "checkpoint.", "mesh."),
    *("train.steps", "train.on_bad_step", "train.spike_factor", "model.attention_kernel", "model.kv_cache"),
    *("data.cache_dir", "data.workers", "tokenizer.path"),
)


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of an option, given by its dotted key."""
    return key in _RESUMABLE or f"{key.split('.')[0]}." in _RESUMABLE
