"""Templates that only pass texts on are known by it, and all others are found out."""

import pytest

from arriero import prompts
from arriero.prompts import Template
from arriero.prompts.opaque import MARK, NotOpaque, Opaque, probing

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{%% for m in messages %%}%s{%% endfor %%}"


def probe(source: str, template: Template | None = None) -> list[str]:
    """What the template prints of one question, in order: `content` or `content.strip`."""
    with probing() as registry:
        message = {"role": "user", "content": registry.add((0, "content"), "")}
        text = (template or Template("t", source)).render([message], **TOKENS)
        found = [registry.texts[int(number)] for number in MARK.findall(str(text))]
    return [f"{field}.{trim}" if trim else field for (_, field), trim in found]


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        ("{{ m.content }}", ["content"]),
        ("{{ m['content'] + eos_token }}{{ m.content }}", ["content", "content"]),
        ("{{ '[' ~ m.content ~ ']' }}", ["content"]),
        ("{{ m.content | trim }}", ["content.strip"]),
        ("{{ m.content.rstrip() }}", ["content.rstrip"]),
        ("{% set text = 'x' + m.content %}{{ text + 'y' }}", ["content"]),
        ("{% set text %}x{{ m.content }}{% endset %}{{ text }}", ["content"]),
        ("{% if m.content %}{{ m.content }}{% else %}none{% endif %}", ["content"]),
        ("{% if m.content == '' %}none{% endif %}{{ m.content }}", ["content"]),
        ("{% if m.content is string %}{{ m.content | default('x') }}{% endif %}", ["content"]),
        ("{% if messages | length > 3 %}x{% endif %}{{ m.content }}", ["content"]),
        ("{% macro say(t) %}<{{ t }}>{% endmacro %}{{ say(m.content) }}", ["content"]),
    ],
)
def test_what_only_passes_text_on_is_opaque(body: str, printed: list[str]) -> None:
    assert probe(LOOP % body) == printed


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ m | tojson }}",
        "{{ m.content | length }}",
        "{{ m.content | replace('a', 'b') }}",
        "{{ m.content | trim('x') }}",
        "{{ m.content.split('x')[0] }}",
        "{{ m.content[:3] }}",
        "{{ m.content[0] }}",
        "{{ m.content * 2 }}",
        "{% if 'x' in m.content %}y{% endif %}",
        "{% if m.content in ['x'] %}y{% endif %}",
        "{% if m.content == 'x' %}y{% endif %}",
        "{% if 'x' != m.content %}y{% endif %}",
        "{% if m.content < 'x' %}y{% endif %}",
        "{% if m.content.startswith('x') %}y{% endif %}",
        "{% if m.content is lower %}y{% endif %}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ ('x' + m.content) | trim }}",
        "{% set t = 'x' ~ m.content %}{% if 'y' in t %}z{% endif %}",
        "{% set t %}{{ m.content }}{% endset %}{{ t[1:] }}",
        "{{ {m.content: 1}[m.content] }}",
        "{{ messages | map(attribute='content') | join(', ') }}",
        "{{ m.content | urlencode }}",
        "{{ m.content | indent }}",
    ],
)
def test_what_looks_into_a_text_is_found_out(body: str) -> None:
    with pytest.raises(NotOpaque):
        probe(LOOP % body)


@pytest.mark.parametrize("name", prompts.known())
def test_every_shipped_template_is_opaque(name: str) -> None:
    assert {item.split(".")[0] for item in probe("", prompts.load(name))} == {"content"}


def test_outside_of_a_probe_nothing_is_refused() -> None:
    assert (
        Template("t", LOOP % "{{ m.content | upper }}").render(
            [{"role": "user", "content": "x"}], **TOKENS
        )
        == "X"
    )
    with pytest.raises(NotOpaque):
        Opaque("x").upper()
