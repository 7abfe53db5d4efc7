import time

import pytest

from arriero.errors import InvalidArgument
from arriero.prompts import sandbox

DOUBLE = "{% set ns = namespace(x='a') %}{% for i in range(60) %}DOUBLED{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "sandbox forbids"),
        ("{{ cycler.__init__.__globals__ }}", "sandbox forbids"),
        ("{{ messages.append(1) }}", "sandbox forbids"),
        ("{{ 'a'.center(99999999999) }}", "sandbox forbids"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 'a' * 1000000000 }}", "stopped at a value"),
        ("{{ 2 ** 99999999 }}", "stopped at a power"),
        ("{{ '%1000000000d' % 1 }}", "stopped at string formatting"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loop"),
        (DOUBLE.replace("DOUBLED", "{% set ns.x = ns.x ~ ns.x %}"), "stopped at a value"),
        (DOUBLE.replace("DOUBLED", "{% set ns.x = ns.x + ns.x %}"), "stopped at a value"),
        (
            DOUBLE.replace(
                "DOUBLED", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
            ),
            "stopped at a value",
        ),
        (DOUBLE.replace("DOUBLED", "{{ 'a' * 1000000 }}"), "an output longer"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% if", "Jinja does not accept it: line 1"),
        ("a" * 300_000, "at most"),
    ],
)
def test_what_a_template_must_not_do_is_refused_quickly(source: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidArgument, match=words):
        sandbox.render(source, {"messages": []})
    assert time.monotonic() - start < 3 * sandbox.MAX_SECONDS


def test_a_template_may_refuse_its_messages() -> None:
    with pytest.raises(InvalidArgument, match="refuses them: roles must alternate") as caught:
        sandbox.render("{{ raise_exception('roles must alternate') }}", {})
    assert caught.value.violations[0].field == "messages"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': 'é<b>'} | tojson }}", '{"a": "é<b>"}'),
        ("{% generation %}hi{% endgeneration %}", "hi"),
        ("{% for i in [1, 2, 3] %}{{ loop.length }}{{ loop.last }};{% endfor %}", None),
        ("{% for i in [1, 2, 3] if i > 1 %}{{ i }}{% endfor %}", "23"),
        ("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", "x1"),
        ("{% for i in nothing %}{% else %}none{% endfor %}", "none"),
        ("{% set a | upper %}x{{ 1 }}{% endset %}{{ a ~ 'y' }}", "X1y"),
        ("  {% if true %}\na\n  {% endif %}\n", "a\n"),
    ],
)
def test_what_chat_templates_do_works(source: str, text: str | None) -> None:
    rendered = sandbox.render(source, {"d": {"x": 1}})
    assert rendered == (text or "3False;3False;3True;")
