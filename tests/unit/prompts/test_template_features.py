"""What the chat templates of model families are made of, rendered as transformers does.

Each template here uses a feature, or a mixture, that templates of Llama 3, Qwen,
Mistral and Hermes models use. The oracle is `apply_chat_template` itself.
"""

# ruff: noqa: E501  (templates, as they are written)

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest

from arriero.errors import InvalidArgument
from arriero.prompts import Template, sandbox

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather: <b>rain</b> & sun.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Lima, Cañete, 北京"},
                "days": {"type": ["integer", "null"]},
                "hours": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALL = {
    "id": "call_0001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Cañete", "days": 2}},
}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "What is the weather in Lima?"},
    {"role": "assistant", "content": "<think>\nI ask.\n</think>\n\nOne moment. ", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call_0001", "content": '{"sky": "grey"}'},
    {"role": "tool", "name": "clock", "content": "noon"},
    {"role": "assistant", "content": "\n\nGrey, at noon."},
    {"role": "user", "content": "And <tomorrow>? {{ no }} {% raw %}"},
]  # fmt: skip
Apply = Callable[..., str]


@pytest.fixture(scope="module")
def apply() -> Apply:
    """transformers' own rendering."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )

    def applied(source: str, messages: list[dict[str, Any]], tools: Any, begin: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=begin,
            )
        )

    return applied


def ours(source: str, messages: list[dict[str, Any]], tools: Any, begin: bool) -> str:
    return Template("model", source).render(
        messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=begin, tools=tools or ()
    )


FEATURES = {
    "namespace": """
        {%- set ns = namespace(found=false, count=0, last=messages|length - 1) %}
        {%- for m in messages %}
            {%- if m.role == 'user' %}{% set ns.found = true %}{% set ns.count = ns.count + 1 %}{% endif %}
        {%- endfor %}
        {{- ns.found }}|{{ ns.count }}|{{ ns.last }}|{{ ns.missing is defined }}""",
    "a scope that ends with its loop": """
        {%- set seen = 0 %}{% for m in messages %}{% set seen = seen + 1 %}{{ seen }}{% endfor %}{{ seen }}""",
    "break and continue": """
        {%- for m in messages %}
            {%- if m.role == 'system' %}{% continue %}{% endif %}
            {%- if m.role == 'tool' %}{% break %}{% endif %}
            {{- m.role }},
        {%- endfor %}""",
    "nested loops": """
        {%- for m in messages %}{% for call in m.tool_calls or [] %}
            {%- for name, value in call.function.arguments.items() %}
                {{- loop.index0 }}{{ loop.first }}{{ name }}={{ value }};
            {%- endfor %}{% else %}-{% endfor %}{% endfor %}""",
    "what loops know": """
        {%- for m in messages %}{{ loop.index }}/{{ loop.length }}/{{ loop.revindex0 }}
        {{- loop.previtem.role if loop.previtem }}>{{ loop.nextitem.role if loop.nextitem is defined }}
        {{- loop.cycle('a', 'b') }}{{ loop.changed(m.role) }};{% endfor %}""",
    "a loop with a condition": """
        {%- for m in messages if m.role != 'tool' %}{{ loop.index }}{{ m.role }}{% if not loop.last %}, {% endif %}{% endfor %}""",
    "a recursive loop": """
        {%- for item in [[1, [2, 3]], 4] recursive %}{% if item is iterable %}({{ loop(item) }}){% else %}{{ item }}{% endif %}{% endfor %}""",
    "slices": """
        {%- for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}|
        {{- messages[1:]|length }}|{{ messages[-1].role }}|{{ messages[1:3]|map(attribute='role')|join('+') }}|
        {{- messages[0].content[:-2] }}|{{ 'abcdef'[::2] }}""",
    "tojson": """
        {%- for t in tools or [] %}{{ t | tojson }}{{ t.function | tojson(indent=4) }}{{ t|tojson(ensure_ascii=True) }}
        {{- t | tojson(separators=(',', ':'), sort_keys=True) }}{% endfor %}{{ messages[-1].content | tojson }}{{ none | tojson }}""",
    "kinds": """
        {%- for x in [tools, messages, messages[0], 'text', 4, 2.5, none, true, (1, 2), missing] %}
            {{- x is mapping }}{{ x is sequence }}{{ x is iterable }}{{ x is string }}{{ x is number }}
            {{- x is none }}{{ x is defined }}{{ x is boolean }}{{ x is integer }}{{ x is float }};
        {%- endfor %}{{ messages[0] is sameas messages[0] }}{{ 3 is odd }}{{ 'a' in 'bar' }}{{ 'user' is in ['user'] }}""",
    "methods of text": """
        {%- set c = messages[2].content %}
        {{- c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}|{{ c.split('</think>')|last|trim }}|
        {{- c.strip() }}|{{ c.startswith('<think>') }}|{{ c.endswith(' ') }}|{{ c.replace('One', 'A') }}|{{ c.upper() }}|
        {{- c.title() }}|{{ c.find('One') }}|{{ c.count('n') }}|{{ 'a, b'.split(', ') }}|{{ c.splitlines() }}|
        {{- ', '.join(['x', 'y']) }}|{{ 'k=v=w'.partition('=') }}|{{ c.removeprefix('<think>') }}|{{ 'x'.isdigit() }}""",
    "maps": """
        {%- for k, v in tools[0].function.parameters.properties | items if tools %}{{ k }}:{{ v.type }};{% endfor %}
        {%- for k, v in (messages[0] | dictsort) %}{{ k }}{% endfor %}
        {%- for k, v in (messages[0] | dictsort(reverse=true, by='value')) %}{{ k }}{% endfor %}
        {{- messages[0].get('nothing', 'else') }}{{ messages[0].keys() | list }}{{ messages[0]['values'] is defined }}
        {{- dict(a=1, **{'b': 2}) }}{{ {'a': 1}.items() | list }}{{ 'content' in messages[0] }}""",
    "filters": """
        {%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ users | length }}
        {{- messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | unique | join(',') }}
        {{- messages | map(attribute='content') | map('trim') | first }}{{ [3, 1, 2] | sort | reverse | list }}
        {{- 'x' | indent(2, true) }}{{ 'a\\nb' | indent(4) }}{{ ' y ' | trim }}{{ missing | default('d') }}{{ '' | default('e', true) }}
        {{- messages | groupby('role') | map('first') | list }}{{ 7 | string ~ '7' | int }}{{ -2 | abs }}{{ 'aB' | capitalize | lower }}
        {{- [1, 2, 3] | sum }}{{ [1, 2, 3] | batch(2) | list }}{{ 'a b' | replace(' ', '_') }}{{ 'l' | upper }}{{ [1, 2] | max }}
        {{- '<&>' | e }}{{ '<&>' | safe }}{{ 'a' | list }}{{ 3.14159 | round(2) }}{{ 'a b c' | wordcount }}{{ [none, 1] | select | list }}""",
    "macros": """
        {%- macro type_of(spec) %}
            {%- if spec.type is string %}{{- {'string': 'str', 'number': 'float'}[spec.type] if spec.type != 'array' else 'list[' ~ type_of(spec['items']) ~ ']' }}
            {%- elif spec.type is iterable %}{{- spec.type | join(' | ') }}{% else %}Any{% endif %}
        {%- endmacro %}
        {%- macro wrap(tag, n=1) %}<{{ tag }}{{ n }}{{ varargs }}{{ kwargs }}>{{ caller() if caller }}</{{ tag }}>{% endmacro %}
        {%- for t in tools or [] %}{% for k, v in (t.function.parameters.properties or {}).items() %}{{ k }}: {{ type_of(v) }}; {% endfor %}{% endfor %}
        {%- call wrap('p', 2, 3, x=4) %}inside{% endcall %}{{ wrap('q') }}""",
    "tests of what is there": """
        {%- if not tools is defined %}{% set tools = none %}{% endif %}{{ tools is none }}
        {%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}
        {{- custom_tools is defined }}{{ documents is defined }}{{ documents is none }}{{ enable_thinking is defined and enable_thinking is false }}
        {{- messages[0].tool_calls is defined }}{{ messages[2]['tool_calls'] is not none }}""",
    "arithmetic and choices": """
        {{- (messages[1].role == 'user') != (1 % 2 == 0) }}{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 8 }}{{ 'ab' * 3 }}{{ [1] + [2] }}
        {{- 'a' if false else 'b' }}{{ 'only' if false }}{{ 1 < 2 <= 2 }}{{ not false and true or false }}{{ 'x' ~ 1 ~ none ~ true }}""",
    "blocks": """
        {%- set text %}a {{ messages | length }}{% endset %}{{ text }}{% set up | upper %}b{{ text }}{% endset %}{{ up }}
        {%- filter trim %}  c  {% endfilter %}{% with x = 4 %}{{ x }}{% endwith %}{{ x is defined }}
        {%- raw %}{{ raw }}{% endraw %}{# a remark #}{% set a, b = 1, 2 %}{{ a + b }}
        {%- if a %}1{% elif b %}2{% else %}3{% endif %}""",
    "generation blocks": """
        {%- for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "white space": """
    {% for m in messages %}
        {% if loop.first %}
            {{ bos_token }}
        {%- endif +%}
    {{ m.role }}:
      {#- nothing -#}
    {{ m.content }}
    {%+ if loop.last %} end {% endif %}

    {% endfor %}
    """,
    "text of the tokenizer": """
        {{- bos_token + 'a' + eos_token }}{% if bos_token %}b{% endif %}{{ eos_token ~ '\\n\\u00e9' }}{{ "\\"" }}{{ '\\'' }}""",
}  # fmt: skip
# Several features at once, in the shapes that tool calling makes of them.
MIXTURES = {
    "tools within the first question": """
        {%- set tools = none if tools is not defined else tools %}
        {%- set lead = messages[0].content | trim if messages[0]['role'] == 'system' else '' %}
        {%- if lead %}{% set messages = messages[1:] %}{% endif %}
        {{- bos_token ~ '[S]' ~ lead ~ '[E]' }}
        {%- if tools is not none %}
            {%- if not messages %}{{ raise_exception('nobody asks') }}{% endif %}
            {{- '[U]' -}}
            {%- for t in tools %}{{- t | tojson(indent=2) ~ '\n' }}{% endfor %}
            {{- messages[0].content | trim + '[E]' }}
            {%- set messages = messages[1:] %}
        {%- endif %}
        {%- for m in messages %}
            {%- if 'tool_calls' in m %}
                {%- if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
                {%- with f = m.tool_calls[0].function %}[C]{{ f.name }}:{{ f.arguments | tojson }}[E]{% endwith %}
            {%- elif m.role in ('tool', 'ipython') %}
                {{- '[R]' ~ (m.content | tojson if m.content is mapping or m.content is iterable else m.content) ~ '[E]' }}
            {%- else %}[{{ m.role[0] | upper }}]{{ m['content'].strip() }}[E]
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}[A]{% endif %}""",
    "thoughts after the last question alone": """
        {%- set at = namespace(question=-1) %}
        {%- for m in messages[::-1] %}
            {%- if m.role == 'user' and m.content is string and not m.content.endswith('</r>') %}
                {%- set at.question = messages | length - 1 - loop.index0 %}{% break %}
            {%- endif %}
        {%- endfor %}
        {%- for m in messages %}
            {%- if m.role == 'tool' %}
                {%- if loop.first or loop.previtem.role != 'tool' %}<results>{% endif %}
                {{- '\n' + m.content }}
                {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '\n</results>' }}{% endif %}
                {%- continue %}
            {%- endif %}
            {%- set said, thought = m.content, '' %}
            {%- if m.role == 'assistant' and '</think>' in said %}
                {%- set thought = (said.split('</think>') | first).split('<think>')[-1].strip('\n') %}
                {%- set said = said.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
            {{- m.role ~ '>' }}
            {%- if thought and loop.index0 > at.question %}{{ '(' ~ thought ~ ')' }}{% endif %}
            {{- said }}
            {%- for call in m.tool_calls or [] %}
                {%- set call = call.function if call.function is defined else call %}
                {{- '\n{"' ~ call.name ~ '": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}}
            {%- endfor %}
            {{- eos_token }}
        {%- endfor %}
        {%- if add_generation_prompt %}assistant>{{ '()' if thinking is defined and thinking is false }}{% endif %}""",
    "turns that must alternate": """
        {%- set talk = messages | rejectattr('role', 'equalto', 'system') | list %}
        {%- set asked = talk | selectattr('role', 'equalto', 'user') | list %}
        {%- set n = namespace(turn=0) %}
        {%- for m in talk if m.role != 'tool' and m.tool_calls is not defined %}
            {%- if (m.role == 'user') != (n.turn % 2 == 0) %}{{ raise_exception('turns must alternate, found ' ~ m.role) }}{% endif %}
            {%- set n.turn = n.turn + 1 %}
        {%- endfor %}
        {{- bos_token }}
        {%- for m in talk %}
            {%- if m == asked[-1] and tools is not none %}
                {%- for t in tools %}
                    {%- for key, value in t.function.items() if key != 'return' -%}
                        {{ key }}={{ '"' + value + '"' if value is string else value | tojson }}{{ ', ' if not loop.last }}
                    {%- endfor %};
                {%- endfor %}
            {%- endif %}
            {%- if m.tool_calls is defined and m.tool_calls is not none %}
                {%- for call in m.tool_calls %}{% set out = call.function | tojson %}
                    {{- out[:-1] ~ ', "id": "' ~ call.id[-4:] ~ '"}' }}
                {%- endfor %}
            {%- else %}{{ '<' ~ m.role ~ '>' ~ m.content | string | trim }}{% endif %}
            {%- if loop.last and messages[0].role == 'system' %}{{ messages[0]['content'] }}{% endif %}
        {%- endfor %}{{ eos_token }}""",
    "signatures of tools": """
        {%- macro written(spec) -%}
            {%- set plain = {'string': 'str', 'number': 'float', 'integer': 'int', 'null': 'None'} %}
            {%- if plain[spec.type] is defined %}{{ plain[spec.type] }}
            {%- elif spec.type == 'array' %}{{ 'list[' + written(spec['items']) + ']' }}
            {%- elif spec.type is string or spec.type is not defined %}Any
            {%- else %}
                {%- for kind in spec.type %}{{ written({'type': kind}) }}{{ ' | ' if not loop.last }}{% endfor %}
            {%- endif %}
        {%- endmacro %}
        {%- for tool in tools or [] %}
            {%- set f = tool.function if tool.function is defined else tool %}
            {{- 'def ' + f.name + '(' }}
            {%- for name, spec in (f.parameters.properties or {}) | items %}
                {{- name ~ ': ' ~ written(spec) }}
                {%- if name not in f.parameters.required | default([]) %} = None{% endif %}
                {{- ', ' if not loop.last }}
            {%- endfor %}{{ ') -> ' ~ written(f.return or {}) }}
            {{- '  # ' ~ f.description if f.description }}
        {%+ endfor %}
        {%- for m in messages %}{{ m.role ~ ': ' ~ m.content }}
        {% endfor %}""",
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("tools", [(), (WEATHER, CLOCK)], ids=["", "tools"])
def test_a_feature_renders_as_transformers_renders_it(
    feature: str, tools: tuple[Any, ...], apply: Apply
) -> None:
    # So that a template that takes none is not refused them.
    source = FEATURES[feature] + "{% if tools %}{% endif %}"
    if feature == "maps" and not tools:
        source = source.replace("tools[0].function.parameters.properties", "messages[0]")
    expected = apply(source, CHAT, list(tools), False)
    assert expected.strip()
    assert ours(source, CHAT, list(tools), False) == expected


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("tools", [(), (WEATHER, CLOCK)], ids=["", "tools"])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:6], CHAT[:2]], ids=["whole", "answered", "asked"])
def test_mixtures_of_them_do_too(
    mixture: str, tools: tuple[Any, ...], chat: list[dict[str, Any]], apply: Apply
) -> None:
    source = MIXTURES[mixture] + "{% if tools %}{% endif %}"
    for begin in (True, False):
        expected = apply(source, chat, list(tools), begin)
        assert len(expected) > 40
        assert ours(source, chat, list(tools), begin) == expected


def test_what_a_template_refuses_is_refused_in_its_own_words(apply: Apply) -> None:
    import jinja2

    source, twice = MIXTURES["turns that must alternate"], [CHAT[1], CHAT[1]]
    with pytest.raises(jinja2.TemplateError, match="must alternate, found user"):
        apply(source, twice, [], False)
    with pytest.raises(InvalidArgument, match="must alternate, found user"):
        ours(source, twice, [], False)


def test_the_date_is_the_templates_own_or_always_the_same(apply: Apply) -> None:
    """The one difference: a prompt that changes with the day is not the one trained on."""
    asks = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}then{% endif %}"
    assert ours(asks, CHAT, [], False) == "then"
    assert apply(asks, CHAT, [], False) == str(datetime.date.today().year)
    # One that does not ask cannot be rendered without.
    needs = "Today is {{ strftime_now('%d %B %Y') }}, {{ strftime_now('%Y-%m-%d') }}."
    assert ours(needs, CHAT, [], False) == "Today is 26 July 2024, 2024-07-26."
    assert "strftime_now" not in sandbox.variables_of(needs)
    with pytest.raises(InvalidArgument, match="longer than"):
        ours("{{ strftime_now('%Y' * 4000000) }}", CHAT, [], False)
