"""Prompt templates: how messages become the text that a model reads.

Responsibility: load, bind and render one template. Does not know tokenizers or
token ids.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.prompts import sandbox

FILE_NAME = "arriero-template.json"
FORMAT = 1
# The name that stands for the tokenizer's own chat template.
MODEL = "model"
# `end_of_turn` of templates that end a turn with the tokenizer's EOS token.
EOS = "eos"
# `end_of_turn` of a Jinja file, which does not say, until it is bound.
_UNKNOWN = ""

_ROLES = ("system", "user", "assistant", "tool")
_PROBE = "arriero probe"
# A template that reads Alpaca's second field itself.
_READS_INPUT = re.compile(r"""\.\s*input\b|\[\s*['"]input['"]\s*\]""")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Template:
    """One template.

    Attributes:
        name: such as `alpaca`; `model` when it came with the model.
        chat_template: Jinja over `messages`, `bos_token`, `eos_token` and
            `add_generation_prompt`, as the HF convention has it. A user message
            may carry `input`, Alpaca's second field; a template that does not
            read it gets it as a further line of `content`.
        stop: strings that end an answer besides the end of turn.
        end_of_turn: `eos`, or the literal token that ends an answer.
        writes_bos: whether rendered text begins with BOS, so that tokenizing it
            must add none.
        system: default system text; None where the template has none.
    """

    name: str
    chat_template: str
    stop: tuple[str, ...] = ()
    end_of_turn: str = EOS
    writes_bos: bool = False
    system: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str | None,
        eos_token: str | None,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of a conversation, in the sandbox.

        Args:
            messages: with role and content each.
            bos_token: as the tokenizer writes it.
            eos_token: likewise.
            add_generation_prompt: end with what begins an answer.
            tools: definitions of functions, as OpenAI's API has them.

        Raises:
            InvalidArgument: messages that are no conversation, or a template
                that fails on them, takes no tools although there are some, or
                passes the sandbox's limits.
        """
        checked = _check_messages(messages)
        if tools and "tools" not in sandbox.variables_of(self.chat_template):
            raise InvalidArgument.field(
                "tools",
                f"the template {self.name!r} of this model does not take any; leave them out, or "
                "serve a model that was trained to call tools",
            )
        if not _READS_INPUT.search(self.chat_template):
            for message in checked:
                if extra := message.pop("input", None):
                    message["content"] += "\n" + extra
        if self.system is not None and checked[0]["role"] != "system":
            checked.insert(0, {"role": "system", "content": self.system})
        return sandbox.render(
            self.chat_template,
            {
                "messages": checked,
                "bos_token": bos_token or "",
                "eos_token": eos_token or "",
                "add_generation_prompt": add_generation_prompt,
                # As transformers has it: None where there are none.
                "tools": list(tools) or None,
                "documents": None,
            },
        )

    def end_text(self, eos_token: str | None) -> str:
        """The text that ends an answer; empty when that is EOS and there is none."""
        return (eos_token or "") if self.end_of_turn == EOS else self.end_of_turn

    def bind(self, *, bos_token: str | None, eos_token: str | None) -> Template:
        """The same template with what is true of it beside this tokenizer.

        `writes_bos` and, for a template that came with a model or as Jinja alone,
        `end_of_turn` and `stop` are read off a rendered probe instead of believed.
        """
        user = {"role": "user", "content": _PROBE}
        answer = {"role": "assistant", "content": _PROBE + " answer"}
        text = self.render([user, answer], bos_token=bos_token, eos_token=eos_token)
        bound = replace(self, writes_bos=bool(bos_token) and text.startswith(str(bos_token)))
        if self.name != MODEL and self.end_of_turn != _UNKNOWN:
            return bound
        end = text.rpartition(answer["content"])[2].strip()
        if not end or (eos_token and end.startswith(eos_token)):
            return replace(bound, end_of_turn=EOS)
        return replace(bound, end_of_turn=end, stop=tuple(dict.fromkeys((*self.stop, end))))

    def to_json(self) -> str:
        """As `arriero-template.json` has it."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "chat_template": self.chat_template,
            "stop": list(self.stop),
            "end_of_turn": self.end_of_turn,
            "writes_bos": self.writes_bos,
            "system": self.system,
        }
        return json.dumps(data, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str = "template") -> Template:
        """The inverse of `to_json`.

        Raises:
            InvalidArgument: not a template, field by field.
            FailedPrecondition: written by a newer Arriero.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument.field("template", f"{origin} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise InvalidArgument.field("template", f"{origin} is not a JSON object")
        version = data.pop("format", FORMAT)
        if not isinstance(version, int) or version > FORMAT:
            raise FailedPrecondition(
                f"{origin} has template format {version!r}; this build reads up to {FORMAT}: "
                "update Arriero"
            )
        return cls(**_check_fields(data, origin))

    def write(self, directory: Path) -> Path:
        """Write `arriero-template.json` into a directory."""
        path = directory / FILE_NAME
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def read(cls, directory: Path) -> Template | None:
        """The template that `write` left in a directory; None when there is none."""
        path = directory / FILE_NAME
        return cls.from_json(path.read_bytes(), origin=path.name) if path.is_file() else None


def known() -> list[str]:
    """Names of the templates that ship, sorted."""
    return sorted(_shipped())


def is_path(name: str) -> bool:
    """Whether a template is named by the path of its file."""
    return "/" in name or name.endswith((".json", ".jinja"))


def load(name_or_path: str | Path, chat_template: str | None = None) -> Template:
    """A template by its name, by the path of its file, or the model's own.

    Args:
        name_or_path: a name of `known()`, the path of a file as `Template.write`
            makes it or of a `.jinja` file, or `model`.
        chat_template: for `model`, the Jinja source that came with the tokenizer.

    Raises:
        InvalidArgument: no such template, or a file that is none.
    """
    name = str(name_or_path)
    if name == MODEL:
        if not chat_template:
            raise InvalidArgument.field(
                "template",
                "the model brings no chat template; name one of " + ", ".join(known()),
            )
        return Template(name=MODEL, chat_template=chat_template)
    if is_path(name):
        try:
            return _from_file(Path(name))
        except OSError as error:
            raise InvalidArgument.field(
                "template", f"cannot read {name!r}: {error.strerror or error}"
            ) from error
    shipped = _shipped()
    if name not in shipped:
        near = difflib.get_close_matches(name.lower(), [*shipped, MODEL], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidArgument.field(
            "template",
            f"unknown template {name!r}; {hint}known templates: {', '.join(known())}, {MODEL}",
        )
    return shipped[name]


def _from_file(path: Path) -> Template:
    if path.stat().st_size > 4 * sandbox.MAX_SOURCE:
        raise InvalidArgument.field(
            "template", f"{path.name} has {path.stat().st_size} bytes; no template is so long"
        )
    if path.suffix != ".jinja":
        return Template.from_json(path.read_bytes(), origin=path.name)
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument.field("template", f"{path.name} is not UTF-8") from error
    sandbox.compile_source(source)
    return Template(name=path.stem, chat_template=source, end_of_turn=_UNKNOWN)


@functools.lru_cache(maxsize=1)
def _shipped() -> dict[str, Template]:
    found = {}
    for entry in resources.files("arriero.prompts").joinpath("templates").iterdir():
        if entry.name.endswith(".json"):
            template = Template.from_json(entry.read_bytes(), origin=entry.name)
            found[template.name] = template
    return found


def _check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidArgument.field("messages", "empty; expected at least one message")
    checked = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise InvalidArgument.field(
                f"messages[{i}].role", f"{role!r} is not one of {', '.join(_ROLES)}"
            )
        if not isinstance(content, str):
            raise InvalidArgument.field(
                f"messages[{i}].content", f"expected text, found {type(content).__name__}"
            )
        extra = message.get("input")
        if not isinstance(extra, str | None):
            raise InvalidArgument.field(
                f"messages[{i}].input", f"expected text, found {type(extra).__name__}"
            )
        checked.append(dict(message))
    return checked


def _check_fields(data: dict[str, Any], origin: str) -> dict[str, Any]:
    expected: dict[str, tuple[type | tuple[type, ...], str]] = {
        "name": (str, "text"),
        "chat_template": (str, "text"),
        "stop": (list, "a list of texts"),
        "end_of_turn": (str, "text"),
        "writes_bos": (bool, "true or false"),
        "system": ((str, type(None)), "text or null"),
    }
    for key in data:
        if key not in expected:
            near = difflib.get_close_matches(key, expected, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArgument.field("template", f"{origin} has an unknown field {key!r}{hint}")
    for key in ("name", "chat_template"):
        if not data.get(key):
            raise InvalidArgument.field("template", f"{origin} has no {key!r}")
    for key, value in data.items():
        kind, words = expected[key]
        if not isinstance(value, kind):
            raise InvalidArgument.field("template", f"{origin}: {key!r} must be {words}")
    stop = data.get("stop", [])
    if not all(isinstance(item, str) and item for item in stop):
        raise InvalidArgument.field("template", f"{origin}: 'stop' must hold non-empty texts")
    if data.get("end_of_turn", EOS) == "":
        raise InvalidArgument.field(
            "template", f"{origin}: 'end_of_turn' is empty; expected {EOS!r} or a literal token"
        )
    sandbox.compile_source(data["chat_template"])
    return {**data, "stop": tuple(stop)}
