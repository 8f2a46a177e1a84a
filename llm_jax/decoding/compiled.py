"""A `jit` decorator that keeps the compiled functions of only the last few models in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from llm_jax.parallel import mesh

_MODELS = 8  # models whose compiled functions are kept


def jit(*, static: tuple[int, ...] = (), donate: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """A decorator like `jax.jit` for functions (model, *arguments) of modules, with the model as a static argument.

    `jax.jit` keeps the compiled code of all models, for example of all geometries of a sweep. This decorator keeps one
    compiled function per model and drops the least recently used. Functions of parameters that are sharded over a mesh
    are traced with this mesh in use.

    Args:
      static: which arguments after the model are static, from 0.
      donate: which arguments after the model are donated, from 0.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.lru_cache(maxsize=_MODELS)
        def of_model(model: Any) -> Any:
            @functools.wraps(function)
            def call(*arguments: Any) -> Any:
                return function(model, *arguments)

            return jax.jit(call, static_argnums=static, donate_argnums=donate)

        @functools.wraps(function)
        def compiled(model: Any, *arguments: Any) -> Any:
            with mesh.using_mesh_of(arguments):
                return of_model(model)(*arguments)

        compiled.of_model = of_model  # type: ignore[attr-defined]
        return compiled

    return decorate
