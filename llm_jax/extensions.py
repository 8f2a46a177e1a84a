"""Custom parts from files of the user: `FILE:NAME` instead of the name of a built-in part.

    --config.model.position.kind="my_decay.py:Decay(strength=0.5)"

FILE is a Python file in the current directory or on PYTHONPATH (`.py` may be omitted), an importable module, or
`__main__` for a part defined in a notebook. NAME is a class or a function in FILE. The options in parentheses are
keyword arguments whose values are Python literals.

A checkpoint records the specification together with a hash of the source: `FILE:NAME(OPTIONS)#SHA256`. Loading the
checkpoint imports FILE again, and fails if FILE is missing or has changed (modules that FILE imports are not compared).
A checkpoint alone cannot cause code to run: FILE is imported only if the user has used the same file with the same
content before (which is recorded in the cache directory), or lists it in $LLM_JAX_ALLOW.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import os
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from llm_jax import files
from llm_jax.errors import UserError
from llm_jax.schema import choice

FAILURES = (Exception, SystemExit)  # what code of the user may raise, other than an interrupt

_SPECIFICATION = re.compile(
    r"(?P<module>[^:#()]+):(?P<name>\w+)(\((?P<options>.*)\))?(#(?P<sha256>[0-9a-f]{12}))?", re.S
)

KEYS = (  # of the configuration
    *("model.position.kind", "tokenizer.kind", "optim.kind", "loss.kind", "data.format"),
    *("quant.scheme", "quant.head", "quant.rules", "quant.qat.scheme", "lora.factors"),
)
FLAGS = ("filter", "format", "scheme", "head", "fallback")  # of commands, besides the rules of --rule
_SCHEME_WITH_GROUP = re.compile(r"\w+:(\d+|channel|tensor)(\+a8)?")  # a built-in quantization scheme, such as int4:64
_RULE = re.compile(r"(?P<pattern>.+?)=(?P<value>[^=()]*|[^=():#]+:\w+\(.*\))", re.S)


@dataclasses.dataclass(frozen=True)
class Extension:
    """A custom part.

    Attributes:
      key: the configuration key or flag whose value specifies the part.
      specification: `FILE:NAME(OPTIONS)#SHA256`, with the first 12 hexadecimal digits of the sha256 of FILE (of the
        source of NAME in a notebook).
      target: the class or function.
      options: the options in parentheses.
    """

    key: str
    specification: str
    target: Any
    options: Mapping[str, Any] = dataclasses.field(hash=False)  # the specification has them

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` (the target or a method of it) with the options as keyword arguments.

        Raises:
          UserError: the function has no parameter of the name of an option.
        """
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p for p in parameters if p.default is not p.empty or p.kind is p.KEYWORD_ONLY}
        for name, value in self.options.items():
            if name not in options:
                raise self.error(f"it has no option '{name}'; its options are {', '.join(options) or 'none'}")
            expected = _type(options[name])
            is_float = expected is float and isinstance(value, int) and not isinstance(value, bool)
            if expected and type(value) is not expected and not is_float:
                raise self.error(f"option '{name}' is {value!r}; expected {expected.__name__}")
        return functools.partial(function, **self.options) if self.options else function

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the target or one of its methods.

        Raises:
          UserError: the call raises an exception; the message has its type, text and line.
        """
        try:
            return function(*arguments)
        except UserError:
            raise
        except FAILURES as error:
            raise self.error(f"it fails ({describe_exception(error)})") from error

    def check_output(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        shape: Mapping[str, int],
        broadcasts: bool = False,
    ) -> None:
        """Traces a function of the part and compares the shape of the array that it returns; None is accepted.

        Args:
          name: name of the function, for the message.
          arguments: trees of arrays or `jax.ShapeDtypeStruct`s.
          shape: {name of an axis: expected size}.
          broadcasts: whether axes of size 1 are also accepted.

        Raises:
          UserError: the function raises an exception, or returns anything else than an array of this shape.
        """
        import jax
        import jax.numpy as jnp

        try:
            output = jax.eval_shape(function, *arguments)
        except UserError:
            raise
        except FAILURES as error:
            raise self.error(f"{name} fails ({describe_exception(error)})") from error
        if output is None:
            return
        sizes = tuple(shape.values())
        expected = f"{sizes} = ({', '.join(shape)})"
        if not hasattr(output, "shape"):
            raise self.error(f"{name} returns {type(output).__name__}; expected an array of shape {expected}")
        fits = len(output.shape) == len(sizes) and all(
            actual == size or (broadcasts and actual == 1) for actual, size in zip(output.shape, sizes, strict=True)
        )
        if not fits or not jnp.issubdtype(output.dtype, jnp.floating):
            raise self.error(
                f"{name} returns {output.dtype} of shape {output.shape}; expected floats of shape {expected}"
            )

    def subclass_of(self, base: type) -> type:
        """The target. Raises UserError unless it is a subclass of `base`."""
        if not (isinstance(self.target, type) and issubclass(self.target, base)):
            raise self.error(f"expected a subclass of {base.__module__}.{base.__name__}")
        return self.target

    def error(self, message: str) -> UserError:
        return UserError(f"{self.key}={self.specification.partition('#')[0]}: {message}")


def describe_exception(error: BaseException) -> str:
    """The type and message of an exception on one line, with its innermost line in a file of the user."""
    frames = traceback.extract_tb(error.__traceback__)
    package, site = str(pathlib.Path(__file__).parent), sysconfig.get_paths()["purelib"]
    library = sysconfig.get_paths()["stdlib"]
    user_frames = [f for f in frames if f.lineno and not f.filename.startswith((package, site, library, "<"))]
    location = f", {pathlib.Path(user_frames[-1].filename).name} line {user_frames[-1].lineno}" if user_frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{location}"


def select(key: str, value: str, table: Mapping[str, Any] | tuple[str, ...]) -> Any:
    """The entry of a table of built-in parts (`value` itself of a tuple), or the `Extension` that `value` specifies.

    Args:
      key: the configuration key or flag, for messages.

    Raises:
      UserError: `value` is neither the name of a built-in part nor a specification that `load` accepts.
    """
    if value.endswith(".py"):
        raise UserError(f"{key}={value}: expected FILE:NAME, with the name of a class or function in the file")
    if value in table or not is_specification(value):
        return choice(key, value, table)
    return load(key, value)


def load(key: str, specification: str) -> Extension:
    """Imports the part that `FILE:NAME`, `FILE:NAME(OPTIONS)` or `FILE:NAME(OPTIONS)#SHA256` specifies.

    Raises:
      UserError: the specification has another form; FILE or NAME does not exist; FILE does not have the recorded hash;
        FILE raises an exception.
    """
    match = _SPECIFICATION.fullmatch(specification)
    if match is None:
        raise UserError(f"{key}={specification}: expected FILE:NAME or FILE:NAME(OPTION=VALUE, ...)")
    name, recorded = match["name"], match["sha256"]
    bare = specification.partition("#")[0] if recorded else specification
    options = _options(key, bare, match["options"] or "")
    path = find_file(match["module"])
    source = path.read_bytes() if path else b""
    file_name = str(path or match["module"])
    if recorded:
        if path is None and file_name != "__main__":
            raise _missing(key, bare, file_name)
        if source:
            _compare(key, bare, file_name, recorded, source)
        if not _is_allowed(file_name, recorded):
            raise UserError(
                f"{key}={bare}: the checkpoint needs the code in {file_name}, which was never used on this machine; "
                f"read the file, and set LLM_JAX_ALLOW={file_name} if you trust it"
            )
    module = _import(key, bare, match["module"], path, source)
    target = getattr(module, name, None)
    if target is None:
        raise UserError(f"{key}={bare}: {match['module']} defines no '{name}'")
    if not callable(target):
        raise UserError(f"{key}={bare}: '{name}' is a {type(target).__name__}; expected a class or a function")
    try:
        source = source or _source(module, target)
    except (OSError, TypeError) as error:
        raise UserError(f"{key}={bare}: the source of '{name}' is not available; define it in a file") from error
    if recorded:
        _compare(key, bare, match["module"], recorded, source)
    sha256 = _sha256(source)
    _allow(file_name, sha256)
    return Extension(key, f"{bare}#{sha256}", target, options)


def is_specification(value: str) -> bool:
    """Whether a value has the form FILE:NAME, unlike the names of built-in parts."""
    return ":" in value and not _SCHEME_WITH_GROUP.fullmatch(value)


def specifications(value: Any) -> Iterator[str]:
    """The specifications of custom parts in the value of an option or flag.

    Args:
      value: a text, several texts, or rules (pattern, value); every other value contains none.
    """
    if isinstance(value, str):
        if is_specification(value):
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from specifications(item[-1] if isinstance(item, list | tuple) and item else item)


def split_rule(text: str) -> tuple[str, str] | None:
    """(REGEX, VALUE) of "REGEX=VALUE", whose VALUE may be a specification with options; None for another text."""
    rule = _RULE.fullmatch(text)
    return (rule["pattern"], rule["value"]) if rule else None


def pinned(key: str, value: Any) -> Any:
    """The value of a configuration key for a checkpoint record: with the hash of the source in every specification.

    Raises:
      UserError: see `load`.
    """
    if isinstance(value, tuple):  # rules
        return tuple((pattern, pinned(key, part)) for pattern, part in value)
    return load(key, value).specification if isinstance(value, str) and is_specification(value) else value


def _options(key: str, specification: str, text: str) -> dict[str, Any]:
    try:
        call: Any = ast.parse(f"part({text})", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{key}={specification}: expected options in parentheses as NAME=VALUE, each value a Python literal"
        ) from error


def require_hash(key: str, value: Any) -> Any:
    """Returns a recorded value. Raises UserError for a custom part without the hash of its source."""
    for text in specifications(value):
        if not re.search("#[0-9a-f]{12}$", text):
            raise UserError(f"{key}={text}: a checkpoint must record the hash of the source; expected FILE:NAME#SHA256")
    return value


def _type(parameter: inspect.Parameter) -> type | None:
    """The plain type of an option, from its annotation or default; None: unknown."""
    plain = {kind.__name__: kind for kind in (bool, int, float, str)}
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return type(parameter.default) if type(parameter.default) in plain.values() else None
    return plain.get(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", ""))


def _sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:12]


def _compare(key: str, bare: str, file_name: str, recorded: str, source: bytes) -> None:
    name, sha256 = pathlib.Path(file_name).name, _sha256(source)
    if sha256 != recorded:
        raise UserError(
            f"{key}={bare}: {name} has changed since the checkpoint was written (sha256 {recorded}, now {sha256}); "
            "restore that version of the file"
        )


def _record_of_use(file_name: str, sha256: str) -> pathlib.Path:
    """The empty file in the cache directory that records that the user has used a file with this content."""
    return files.cache_directory() / "own_parts" / hashlib.sha256(f"{file_name} {sha256}".encode()).hexdigest()


def _is_allowed(file_name: str, sha256: str) -> bool:
    allowed = [name for name in os.environ.get("LLM_JAX_ALLOW", "").split(os.pathsep) if name]
    return file_name in {str(find_file(n) or n) for n in allowed} or _record_of_use(file_name, sha256).exists()


def _allow(file_name: str, sha256: str) -> None:
    with contextlib.suppress(OSError):  # without a writable cache, $LLM_JAX_ALLOW can be used
        record = _record_of_use(file_name, sha256)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()


def _import(key: str, specification: str, name: str, path: pathlib.Path | None, source: bytes) -> ModuleType:
    try:
        return _module(path, source) if path and "." not in name.removesuffix(".py") else importlib.import_module(name)
    except FAILURES as error:
        if isinstance(error, ModuleNotFoundError) and error.name is not None and name.startswith(error.name):
            raise _missing(key, specification, name) from error
        raise UserError(f"{key}={specification}: {name} fails ({describe_exception(error)})") from error


def _missing(key: str, specification: str, name: str) -> UserError:
    return UserError(
        f"{key}={specification}: no file or module '{name}'; run in the directory of the file, or add it to PYTHONPATH"
    )


def _source(module: ModuleType, target: Any) -> bytes:
    file = getattr(module, "__file__", None)
    if file and module.__name__ != "__main__":
        return pathlib.Path(file).read_bytes()
    if isinstance(target, type) and target.__module__ == "__main__" and not file:
        return _source_in_cell(target).encode()
    return inspect.getsource(target).encode()


def _source_in_cell(cls: type) -> str:
    """The source of a class that is defined in a notebook; `inspect.getsource` supports only functions there.

    Raises:
      OSError: no function of the class has a source in which the class is defined.
    """
    for function in vars(cls).values():
        code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
        cell = "".join(linecache.getlines(code.co_filename)) if code else ""
        for node in ast.walk(ast.parse(cell)) if cell else ():
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return "".join(cell.splitlines(keepends=True)[first - 1 : node.end_lineno])
    raise OSError(f"no source of {cls.__name__}")


def module_name(specification: str) -> str:
    """FILE of `FILE:NAME(OPTIONS)#SHA256`; "" for the name of a built-in part."""
    match = _SPECIFICATION.fullmatch(specification)
    return match["module"] if match else ""


def relative_path(name: str) -> str:
    """The relative path of the file of `NAME`, `NAME.py`, `DIRECTORY/NAME.py` or `PACKAGE.NAME`."""
    return name if name.endswith(".py") else f"{name.replace('.', '/')}.py"


def find_file(name: str) -> pathlib.Path | None:
    """The file of `NAME`, `NAME.py`, `DIRECTORY/NAME.py` or `PACKAGE.NAME` below the current directory or sys.path."""
    if name == "__main__":
        return None
    candidates = (pathlib.Path(directory).expanduser() / relative_path(name) for directory in ("", *sys.path))
    return next((path.resolve() for path in candidates if path.is_file()), None)


@functools.lru_cache(64)
def _module(path: pathlib.Path, source: bytes) -> ModuleType:
    """The module of a file, executed once for each version of its content."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{hashlib.sha256(source).hexdigest()[:12]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look up their module
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module
