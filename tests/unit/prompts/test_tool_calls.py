"""Tools in templates, and calls in answers."""

import json

import pytest

from arriero.errors import InvalidArgument
from arriero.prompts import Template, load
from arriero.prompts.tool_calls import ToolCallParser, names_of, read_calls, read_tools

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
# As Qwen2.5's template writes tools, calls and answers of tools, shortened.
QWEN = """
{%- if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- for call in message.tool_calls %}
{%- if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
{{- call.arguments | tojson ~ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' ~ message.content ~ '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
# As LLaMA 3.1's begins.
LLAMA = """
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}{{ message.content }}{% endfor %}
"""


def render(source: str, messages: list[dict], tools: list[dict]) -> str:
    return Template("model", source).render(
        messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, tools=tools
    )


def test_tools_calls_and_answers_reach_a_template_as_transformers_hands_them_over():
    call = {"id": "1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Lima"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": read_calls(json.dumps([call]))},
        {"role": "tool", "content": "17 degrees", "tool_call_id": "1"},
    ]
    text = render(QWEN, messages, [WEATHER])
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert '{"name": "weather", "arguments": {"city": "Lima"}}' in text
    assert "<tool_response>\n17 degrees\n" in text
    assert '"name": "weather"' in render(LLAMA, messages[:1], [WEATHER])


def test_no_tools_change_nothing():
    hello = [{"role": "user", "content": "Hello"}]
    assert render(LLAMA, hello, []).strip() == "Hello"
    assert "Tools" not in render(QWEN, hello, [])


def test_a_template_that_takes_no_tools_refuses_them():
    with pytest.raises(InvalidArgument, match="'chatml' of this model does not take any"):
        load("chatml").render(
            [{"role": "user", "content": "x"}], bos_token=None, eos_token=None, tools=[WEATHER]
        )


def read(text: str, step: int = 1) -> tuple[str, list[tuple[str, dict]]]:
    """Shown text and calls of an answer that comes in steps of some characters."""
    parser = ToolCallParser(names_of(read_tools(json.dumps([WEATHER]))))
    shown = "".join(parser.push(text[i : i + step]) for i in range(0, len(text), step))
    rest, calls = parser.finish()
    assert len({call.id for call in calls}) == len(calls)
    return shown + rest, [(call.name, json.loads(call.arguments)) for call in calls]


LIMA = ("weather", {"city": "Lima"})
JSON = '{"name": "weather", "arguments": {"city": "Lima"}}'


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (f"<tool_call>\n{JSON}\n</tool_call>", "", [LIMA]),
        (f"I look.\n<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>",
         "I look.\n", [LIMA, LIMA]),
        (f"<tool_call>[{JSON}, {JSON}]</tool_call>", "", [LIMA, LIMA]),
        (f"<tool_call>{JSON}", "", [LIMA]),  # max_tokens, or a closing tag that is no text
        ('{"name": "weather", "parameters": {"city": "Lima"}}', "", [LIMA]),
        ('<|python_tag|>{"name": "weather", "parameters": {}}', "", [("weather", {})]),
        (f"{JSON}; {JSON}", "", [LIMA, LIMA]),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Lima\\"}"}', "", [LIMA]),
        # Text that looks like it.
        ("Use <tool> or a < b.", "Use <tool> or a < b.", []),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"name": ["weather"]}', '{"name": ["weather"]}', []),
        ('{"answer": 42', '{"answer": 42', []),
        (f"So: {JSON}", f"So: {JSON}", []),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('{"name": "weather", "arguments": 3}', '{"name": "weather", "arguments": 3}', []),
        ("ends in <tool_ca", "ends in <tool_ca", []),
        ("  ", "  ", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_calls_are_told_from_text_however_it_comes(text, shown, calls, step):
    assert read(text, step) == (shown, calls)


def test_text_that_is_no_call_is_not_held_back():
    parser = ToolCallParser(["weather"])
    assert parser.push("The weather") == "The weather"
    assert parser.push(" is {") == " is {"
    assert parser.push(" fine <tool") == " fine "
    assert parser.push(" shed") == "<tool shed"


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ("{", "tools"),
        ("{}", "tools"),
        ('[{"type": "function"}]', "tools[0]"),
        ('[{"type": "retrieval", "function": {"name": "x"}}]', "tools[0]"),
        ("[" * 100_000, "tools"),
    ],
)
def test_tools_that_are_none_are_refused_by_name(tools, field):
    with pytest.raises(InvalidArgument) as refused:
        read_tools(tools)
    assert refused.value.violations[0].field == field


def test_arguments_of_earlier_calls_must_be_json():
    with pytest.raises(InvalidArgument, match=r"tool_calls\[0\].function.arguments"):
        read_calls('[{"function": {"name": "x", "arguments": "{"}}]')
