"""Weights and inputs of the tiny models, from a frozen generator: what the golden's script and the tests share."""

import numpy as np

LENGTH = 12
_SAME = {
    "lm_head.lora_A.weight": "model.embed_tokens.lora_embedding_B",
    "lm_head.lora_B.weight": "model.embed_tokens.lora_embedding_A",
    "lm_head.base_layer.weight": "model.embed_tokens.base_layer.weight",
    "lm_head.weight": "model.embed_tokens.weight",
}
MASK = np.array([[1] * LENGTH, [1] * 9 + [0] * 3])


def _draws(name: str) -> np.random.RandomState:
    return np.random.RandomState(sum(map(ord, name)) % 2**31)


def tensors(family: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{name: float32 array}; norms are near what leaves things as they are."""
    found = {}
    for name, shape in sorted(shapes.items()):
        values = _draws(family + name).standard_normal(shape).astype(np.float32) * np.float32(0.2)
        norm = name.endswith("weight") and len(shape) == 1
        found[name] = values + np.float32(norm and "gemma" not in family)
    return found


def ids(family: str) -> np.ndarray:
    return _draws(family).randint(3, 64, (2, LENGTH))


def adapters(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{name: float32 array} of an adapter of peft; lengths of columns are near 1."""
    found = {}
    for tensor, shape in sorted(shapes.items()):
        values = _draws(name + tensor).standard_normal(shape).astype(np.float32) * np.float32(0.2)
        found[tensor] = values + np.float32(tensor.endswith("magnitude_vector"))
    for tensor in found if "tied" in name else ():  # what is tied is saved twice
        for end, other in _SAME.items():
            if tensor.endswith(end) and (source := tensor.replace(end, other)) in found:
                found[tensor] = np.ascontiguousarray(found[source].T if "lora" in end else found[source])
    return found
