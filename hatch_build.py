"""Build hook of the wheel: compiles the C++ kernels if a compiler is installed, unless LLM_JAX_KERNELS=xla.

A wheel with compiled kernels has the tag of its platform, a wheel without them is for any platform.
"""

import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):  # type: ignore[misc]
    """Adds the compiled library to a wheel."""

    def dependencies(self) -> list[str]:
        """Requires jaxlib, which ships the headers of XLA's FFI, if the kernels will be compiled."""
        if self._missing():
            return []
        requirements = pathlib.Path(self.root, "requirements.txt").read_text()
        return [f"jaxlib{version}" for version in re.findall(r"^jax\b(.*)$", requirements, re.M)]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library and adds it to the wheel. An editable install compiles the kernels on first use."""
        if version == "editable":
            return
        self._directory = tempfile.TemporaryDirectory()
        reason = self._missing()
        if not reason:
            compiler = self._compiler()
            try:
                library = pathlib.Path(self._directory.name, compiler.file_name())
                library.write_bytes(compiler.compile_for_xla(compiler.find_compiler()))
            except ValueError as error:  # a UserError
                reason = str(error)
        if reason:
            self.app.display_warning(f"this wheel carries no compiled kernels: {reason}")
            return
        from packaging import tags

        # manylinux and musllinux promise that the library needs only old versions of the C and C++ libraries.
        platform = next(tag for tag in tags.platform_tags() if not tag.startswith(("manylinux", "musllinux")))
        build_data["force_include"][str(library)] = f"llm_jax/kernels/prebuilt/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._directory.cleanup()

    def _missing(self) -> str:
        """The reason why the kernels cannot or must not be compiled, or ""."""
        if os.environ.get("LLM_JAX_KERNELS") == "xla":
            return "LLM_JAX_KERNELS=xla"
        try:
            self._compiler().find_compiler()
        except ValueError as error:
            return str(error)
        return ""

    def _compiler(self) -> Any:
        sys.path.insert(0, self.root)
        try:
            from llm_jax.kernels import compiler
        finally:
            sys.path.remove(self.root)
        return compiler
