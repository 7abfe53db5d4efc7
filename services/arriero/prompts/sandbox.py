"""Jinja in a cage: chat templates come with models, so they are input, not code.

Responsibility: compile a template and render it with bounds on loops, strings,
output and time. Does not know what a message is. What it bounds is what loops
and output can cost; it is no substitute for a memory limit on the process.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.visitor
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from arriero.errors import InvalidArgument
from arriero.prompts import opaque

# A long conversation is about 1 MB; these are far above what a template needs.
MAX_SOURCE = 256 * 1024
MAX_TEXT = 8 * 1024 * 1024
MAX_ITERATIONS = 200_000
MAX_SECONDS = 5.0

# The date of templates that cannot do without one. A prompt that changes with the day
# is not the one trained on, so it is always the same: the one that Llama 3's templates
# fall back to.
DATE = datetime.datetime(2024, 7, 26, 12)
_DATE_NAME = "strftime_now"

# Methods whose result can be any size that their argument says.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})


class _LimitExceeded(Exception):
    pass


@dataclass(slots=True)
class _Budget:
    iterations: int
    deadline: float

    def spend(self) -> None:
        self.iterations -= 1
        if self.iterations < 0:
            raise _LimitExceeded(f"more than {MAX_ITERATIONS} loop iterations")
        if time.monotonic() > self.deadline:
            raise _LimitExceeded(f"more than {MAX_SECONDS:g} s")


_budget: ContextVar[_Budget] = ContextVar("arriero_template_budget")


@jinja2.pass_context  # which also keeps Jinja from folding it at compile time
def _bounded(_context: Any, items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for item in items:
        budget.spend()
        yield item


def _checked(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple) and len(value) > MAX_TEXT:
        raise _LimitExceeded(f"a value longer than {MAX_TEXT} characters")
    return opaque.kept(value)


@jinja2.pass_context
def _sized(_context: Any, value: Any) -> Any:
    return _checked(value)


def _checked_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _checked(function(*args, **kwargs))

    return call


class _Generation(Extension):
    """`{% generation %}`, which marks assistant text in some chat templates: transparent here."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Bars(jinja2.visitor.NodeTransformer):
    """Puts a check around what Jinja has no hook for: loops, `~` and block assignments."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_bounded", node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_sized", node.lineno)

    def visit_AssignBlock(self, node: jinja2.nodes.AssignBlock) -> jinja2.nodes.Node:
        self.generic_visit(node)
        # Jinja's convention for block filters: the innermost filters None.
        node.filter = _filtered(node.filter, "_sized", node.lineno)
        return node


def _filtered(node: Any, name: str, line: int) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=line)


class _Cage(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        caged = _Bars().visit(tree)
        assert isinstance(caged, jinja2.nodes.Template)
        # Nodes made after parsing know their environment only by this.
        return caged.set_environment(self)  # type: ignore[return-value]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                repeats = isinstance(text, str | list | tuple) and isinstance(times, int)
                if repeats and len(text) * times > MAX_TEXT:
                    raise _LimitExceeded(f"a value longer than {MAX_TEXT} characters")
        elif operator == "**" and (abs(left) > 2**31 or abs(right) > 64):
            raise _LimitExceeded("a power that large")
        elif operator == "%" and isinstance(left, str):
            raise _LimitExceeded("string formatting by %")
        return _checked(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return _checked(super().call(context, obj, *args, **kwargs))


class _RaisedByTemplate(Exception):
    pass


def _strftime_now(form: str) -> str:
    return DATE.strftime(form)


def _raise_exception(message: str) -> None:
    raise _RaisedByTemplate(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As transformers has it: Jinja's own escapes HTML, which would change prompts.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=1)
def _environment() -> _Cage:
    cage = _Cage(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    cage.filters["tojson"] = _tojson
    for name in ("center", "format"):
        del cage.filters[name]
    cage.filters = {
        name: _checked_filter(opaque.guarded(name, f)) for name, f in cage.filters.items()
    }
    cage.filters |= {"_bounded": _bounded, "_sized": _sized}
    cage.globals.pop("lipsum", None)
    cage.globals["raise_exception"] = _raise_exception
    return cage


@functools.lru_cache(maxsize=64)
def compile_source(source: str) -> jinja2.Template:
    """Compile a template's source.

    Raises:
        InvalidArgument: it is too long, or no Jinja.
    """
    if len(source) > MAX_SOURCE:
        raise InvalidArgument.field(
            "template", f"the Jinja source has {len(source)} characters; at most {MAX_SOURCE}"
        )
    try:
        return _environment().from_string(source, globals=_date(source))
    except jinja2.TemplateSyntaxError as error:
        raise InvalidArgument.field(
            "template", f"Jinja does not accept it: line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise InvalidArgument.field("template", "the Jinja source nests too deeply") from error


def _date(source: str) -> dict[str, Any]:
    """`strftime_now`, unless the template asks whether there is one: it has its own date then."""
    if _DATE_NAME not in source:
        return {}
    tree = _environment().parse(source)
    asks = any(
        test.name == "defined" and isinstance(test.node, jinja2.nodes.Name)
        and test.node.name == _DATE_NAME
        for test in tree.find_all(jinja2.nodes.Test)
    )  # fmt: skip
    return {} if asks else {_DATE_NAME: _strftime_now}


def variables_of(source: str) -> set[str]:
    """The names that a template takes from outside.

    Raises:
        InvalidArgument: as `compile_source`.
    """
    compile_source(source)
    environment = _environment()
    found = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return found - environment.globals.keys() - {_DATE_NAME}


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template's source within the limits.

    Raises:
        InvalidArgument: the template does not compile, refuses its input, does
            what the sandbox forbids, or passes a limit.
    """
    template = compile_source(source)
    token = _budget.set(_Budget(MAX_ITERATIONS, time.monotonic() + MAX_SECONDS))
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**variables):
            size += len(piece)
            if size > MAX_TEXT:
                raise _LimitExceeded(f"an output longer than {MAX_TEXT} characters")
            pieces.append(piece)
    except _RaisedByTemplate as error:
        raise InvalidArgument.field(
            "messages", f"the template refuses them: {str(error)[:500]}"
        ) from error
    except _LimitExceeded as error:
        raise InvalidArgument.field("template", f"rendering was stopped at {error}") from error
    except jinja2.exceptions.SecurityError as error:
        raise InvalidArgument.field(
            "template", f"it does what the sandbox forbids: {str(error)[:500]}"
        ) from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise InvalidArgument.field(
            "template", f"rendering failed: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    finally:
        _budget.reset(token)
    return "".join(pieces)
