"""A chat template rendered once for each shape of conversation, instead of once for each conversation.

A shape is the roles of the messages. While a conversation is rendered, a placeholder stands for the text of each
message, and the trace records what the template does with it: methods that give another text, such as ``strip``, and
tests, such as ``'</think>' in content``. The result is a list of pieces: what the template writes, and places for the
texts. Another conversation of the same shape is filled into them if all recorded tests have the same outcome for it.
The rendering is therefore exact: a template that does anything else with a text cannot be traced, and is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignkit.rows import Conversation

SHAPES = 4096  # that are kept for a template
TRACES = 16  # that are kept for a shape; each has other outcomes of its tests

_FIRST = 0x100000  # placeholders are private-use characters from here on
_PLACE = re.compile("([\U00100000-\U0010fffd])")

_TEXTS = ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "lower", "upper")
_TESTS = ("__contains__", "__eq__", "__ne__", "startswith", "endswith")
_OF_OBJECTS = {  # of Python's own, which look at no characters
    *("__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__getnewargs__", "__getstate__"),
    *("__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__", "__setattr__", "__sizeof__"),
    "__subclasshook__",
}

_FILTERS_OF_TEXT = ("trim", "string", "default", "d")  # they work through methods of the text
_FILTERS_OF_LISTS = ("length", "count", "first", "last", "list", "reverse", "map", "selectattr", "rejectattr")
_KINDS = ("string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "boolean", "number", "callable")


class Untraceable(Exception):  # noqa: N818
    """The template does something with a text that is not traced."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise Untraceable


@dataclass(frozen=True)
class Source:
    """A text that is made from a message: the message's number, and the methods that are called on its text."""

    message: int
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def then(self, method: str, *arguments: Any) -> Source:
        """The text that a method makes of this one."""
        return Source(self.message, (*self.calls, (method, arguments)))

    def value(self, texts: Sequence[str]) -> Any:
        """Its value, given the text of each message."""
        value: Any = texts[self.message]
        for method, arguments in self.calls:
            value = getattr(value, method)(*arguments)
        return value


@dataclass
class Trace:
    """A template's treatment of the texts of a conversation."""

    sources: list[Source] = field(default_factory=list)  # of the placeholders
    tests: dict[Source, Any] = field(default_factory=dict)  # with their outcomes
    pieces: list[str | Source] = field(default_factory=list)

    def fits(self, texts: Sequence[str]) -> bool:
        """Whether every test has the recorded outcome for these texts."""
        return all(test.value(texts) == outcome for test, outcome in self.tests.items())

    def fill(self, texts: Sequence[str]) -> str:
        """The rendered conversation with these texts."""
        return "".join([piece if isinstance(piece, str) else piece.value(texts) for piece in self.pieces])

    def read(self, rendered: str) -> None:
        """Take the pieces from a rendering with placeholders."""
        parts = _PLACE.split(rendered)
        self.pieces = [self.sources[ord(part) - _FIRST] if n % 2 else part for n, part in enumerate(parts)]


class Joined(str):
    """Text that holds placeholders. It can be joined with other text and written, and nothing else."""

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Joined:
        return Joined(str.__add__(self, other))

    def __radd__(self, other: str) -> Joined:
        return Joined(str.__add__(other, self))


class Placeholder(Joined):
    """Stands for a text that is made from a message; ``_value`` is that text in the conversation that is traced."""

    _trace: Trace
    _source: Source
    _value: str

    @classmethod
    def _of(cls, trace: Trace, source: Source, value: str) -> Placeholder:
        """A new placeholder of a trace."""
        made = cls(chr(_FIRST + len(trace.sources)))
        made._trace, made._source, made._value = trace, source, value
        trace.sources.append(source)
        return made

    def _test(self, method: str, *arguments: Any) -> Any:
        """The outcome of a method that tests the text; it is recorded."""
        _plain(arguments)
        outcome = getattr(self._value, method)(*arguments)
        self._trace.tests[self._source.then(method, *arguments)] = outcome
        return outcome

    def __bool__(self) -> bool:
        return bool(self._test("__ne__", ""))

    def split(self, *arguments: Any) -> list[Placeholder]:  # type: ignore[override]
        """The parts, whose number is recorded."""
        _plain(arguments)
        parts, source = self._value.split(*arguments), self._source.then("split", *arguments)
        self._trace.tests[source.then("__len__")] = len(parts)
        return [Placeholder._of(self._trace, source.then("__getitem__", n), part) for n, part in enumerate(parts)]


def _making(method: str) -> Callable[..., Placeholder]:
    def call(self: Placeholder, *arguments: Any) -> Placeholder:
        _plain(arguments)
        value = getattr(self._value, method)(*arguments)
        return Placeholder._of(self._trace, self._source.then(method, *arguments), value)

    return call


def _testing(method: str) -> Callable[..., Any]:
    return lambda self, *arguments: self._test(method, *arguments)


for _name in {*dir(str), "__rmod__"} - _OF_OBJECTS - {"__str__", "__add__", "__radd__"}:
    setattr(Joined, _name, _refuse)
for _name in _TEXTS:
    setattr(Placeholder, _name, _making(_name))
for _name in _TESTS:
    setattr(Placeholder, _name, _testing(_name))


def _plain(value: Any) -> None:
    """Refuse a value that holds placeholders."""
    if isinstance(value, Joined):
        raise Untraceable
    if isinstance(value, list | tuple):
        for each in value:
            _plain(each)
    elif isinstance(value, dict):
        _plain(list(value.values()))


class _Compiler(CodeGenerator):
    """Compiles ``a ~ b`` and ``a in b`` to calls of the environment's ``concat`` and ``contains``."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        if node.ops[0].op not in ("in", "notin"):
            super().visit_Compare(node, frame)
            return
        self.write("(not " if node.ops[0].op == "notin" else "(")
        self.write("environment.contains(")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(node.ops[0].expr, frame)
        self.write("))")


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no placeholder reaches code that would look at its characters unseen."""

    code_generator_class = _Compiler

    def __init__(self, like: ImmutableSandboxedEnvironment) -> None:
        extensions = [type(extension) for extension in like.extensions.values()]
        super().__init__(trim_blocks=like.trim_blocks, lstrip_blocks=like.lstrip_blocks, extensions=extensions)
        self.globals = {**like.globals, "raise_exception": _refuse}
        self.filters = {
            name: function if name in (*_FILTERS_OF_TEXT, *_FILTERS_OF_LISTS) else _of_plain_values(function)
            for name, function in like.filters.items()
        }
        kinds: dict[str, Any] = like.tests
        self.tests = {name: _of_kinds(name, function) for name, function in kinds.items()}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        """The parts as one text, which still is a placeholder's if it is nothing else."""
        listed = [part for part in parts if isinstance(part, Joined) or part]
        if len(listed) == 1:
            return listed[0]
        text = "".join(listed)
        return Joined(text) if any(isinstance(part, Joined) for part in listed) else text

    @staticmethod
    def contains(item: Any, container: Any) -> bool:
        """``item in container``, where only a placeholder may be searched for a text and only a list for one."""
        if isinstance(container, str | dict):
            _plain(item)
        return item in container

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805
        """A call in a template; only macros, ``dict`` and ``namespace`` take texts as they are."""
        is_method = isinstance(getattr(__obj, "__self__", None), Placeholder)
        if not (isinstance(__obj, Macro) or is_method or __obj in (dict, __self.globals["namespace"])):
            _plain([arguments, [value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")]])
        return super().call(__context, __obj, *arguments, **named)


def _of_plain_values(function: Callable[..., Any]) -> Callable[..., Any]:
    def filtered(*arguments: Any, **named: Any) -> Any:
        _plain([arguments, named])
        return function(*arguments, **named)

    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, mark):
            setattr(filtered, mark, getattr(function, mark))
    return filtered


def _of_kinds(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name in ("iterable", "sequence"):  # a text is both
        return lambda value: isinstance(value, Joined) or function(value)
    return function if name in _KINDS else _of_plain_values(function)


def is_traceable(tree: nodes.Template) -> bool:
    """Whether a template has no expression that looks at a placeholder unseen: ``"%" % x``, ``x in y in z``."""
    formats = any(isinstance(each.left, nodes.Const) for each in tree.find_all(nodes.Mod))
    chains = any(len(each.ops) > 1 for each in tree.find_all(nodes.Compare))
    return not formats and not chains


class TracedTemplate:
    """A chat template that renders conversations of known shapes without Jinja."""

    def __init__(self, environment: ImmutableSandboxedEnvironment, source: str, variables: dict[str, Any]) -> None:
        self._variables = variables
        self._traces: dict[tuple[Any, ...], list[Trace]] = {}
        self._template = None
        if is_traceable(environment.parse(source)) and not _PLACE.search(source):
            self._template = TracingEnvironment(environment).from_string(source)

    def __call__(self, messages: Conversation, add_generation_prompt: bool) -> str | None:
        """The conversation as text; None where it has to be rendered."""
        if self._template is None:
            return None
        shape: list[Any] = [add_generation_prompt]
        texts = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str) or len(message) > 2 + ("weight" in message):
                return None
            shape.append(message["role"])
            texts.append(content)
        traces = self._traces.get(tuple(shape))
        if traces is None:
            if len(self._traces) >= SHAPES:
                return None
            traces = self._traces[tuple(shape)] = []
        for trace in traces:
            if trace.fits(texts):
                return trace.fill(texts) if trace.pieces else None
        if len(traces) < TRACES:
            traces.append(self._trace(messages, add_generation_prompt))
        return None

    def _trace(self, messages: Conversation, add_generation_prompt: bool) -> Trace:
        """The trace of a rendering; without pieces where it cannot be traced."""
        assert self._template is not None
        trace = Trace()
        if any(_PLACE.search(message["role"]) for message in messages):
            return trace
        listed = [
            {"role": message["role"], "content": Placeholder._of(trace, Source(number), message["content"])}
            for number, message in enumerate(messages)
        ]
        try:
            rendered = self._template.render(
                messages=listed, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except Exception:  # the template refuses the conversation, or cannot be traced
            return trace
        trace.read(str.__str__(rendered))
        return trace
