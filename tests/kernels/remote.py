"""Calls of the kernels by a program for another CPU, which an emulator runs; see remote.cc."""

import ctypes
import pathlib
import subprocess
from collections.abc import Callable

import numpy as np

from llm_jax.kernels import compiler, native

FUNCTIONS = ("quantized", "blockwise", "integer", "bfloat16", "attention")
_BASE, _PAGE = 0x10_0000_0000, 4096  # where the program maps the operands
FLAGS = ("-O2", *compiler.FLAGS[1:], "-DLLM_JAX_WITHOUT_XLA", f"-I{compiler.SOURCES}")


def build(program: str, output: pathlib.Path, *flags: str) -> None:
    """Compiles the kernels and the program that calls them, statically."""
    sources = [pathlib.Path(__file__).with_name("remote.cc"), *sorted(compiler.SOURCES.glob("*.cc"))]
    subprocess.run([program, *FLAGS, *flags, "-static", *sources, "-o", output], check=True)


class Calls:
    """Operands of calls in one file; every array ends at a page without access."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.calls: list[tuple[int, int, int, int]] = []
        self.results: list[tuple[int, tuple[int, ...]]] = []
        self.end = 64 * _PAGE  # room for the calls and the guards
        self.guards: list[int] = []

    def place(self, array: np.ndarray | ctypes.Structure) -> int:
        """Copies an array or a struct; returns its address in the program."""
        data = bytes(array) if isinstance(array, ctypes.Structure) else array.tobytes()
        end = -(-(self.end + len(data)) // _PAGE) * _PAGE
        self.pieces.append((end - len(data), data))
        self.guards.append(end)
        self.end = end + _PAGE
        return _BASE + end - len(data)

    def add(
        self, function: str, path: str, request: Callable[["Calls", int], ctypes.Structure], shape, threads=1
    ) -> None:
        """Adds a call with a result float32 `shape`; request(self, address of the result) places the operands."""
        y = self.place(np.full(shape, np.nan, np.float32))
        self.results.append((y - _BASE, shape))
        address = self.place(request(self, y))
        self.calls.append((FUNCTIONS.index(function), native.PATHS.index(path), threads, address))

    def run(self, command: list[str], file: pathlib.Path) -> list[np.ndarray]:
        """The results of the calls by the program that `command` starts."""
        head = np.array(self.calls, np.int64).tobytes() + np.array(self.guards, np.int64).tobytes()
        assert len(head) <= 64 * _PAGE
        image = np.zeros(self.end, np.uint8)
        for offset, data in [(0, head), *self.pieces]:
            image[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        image.tofile(file)
        numbers = (_BASE, self.end, len(self.calls), len(self.guards))
        done = subprocess.run([*command, str(file), *map(str, numbers)], capture_output=True, text=True, check=False)
        assert not done.returncode, (done.returncode, done.stderr)
        image = np.fromfile(file, np.uint8)
        return [image[y : y + 4 * int(np.prod(shape))].view(np.float32).reshape(shape) for y, shape in self.results]
