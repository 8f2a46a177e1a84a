"""The platform that a function is compiled for, which kernels are chosen by."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in use while a function is traced, otherwise JAX's default backend.

    They differ where a step is compiled for devices that this machine does not have.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else str(name)
