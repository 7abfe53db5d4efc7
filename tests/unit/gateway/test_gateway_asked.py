"""What OpenAI's clients may send: taken, passed over, or refused by name."""

import json
from typing import Any

import pytest

from arriero.errors import InvalidArgument
from arriero.gateway.asked import read_chat, read_completion

CHAT: dict[str, Any] = {"model": "faq", "messages": [{"role": "user", "content": "Hello"}]}


def body(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


def test_a_chat_has_its_messages_and_no_sampling_that_was_not_asked_for() -> None:
    ask = read_chat(body())
    assert ask.model == "faq"
    assert list(ask.messages) == [{"role": "user", "content": "Hello"}]
    assert ask.sampling == {}
    assert not ask.stream


def test_sampling_goes_on_under_llama_cpps_names() -> None:
    ask = read_chat(
        body(temperature=0, top_p=0.5, top_k=3, min_p=0.1, repeat_penalty=1.1, seed=7, stop="END")
    )
    assert ask.sampling == {
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "seed": 7,
        "stop": ["END"],
    }


def test_biases_formats_and_log_probabilities_become_the_engines() -> None:
    ask = read_chat(body(logit_bias={"5": 1.5, "6": -100}, logprobs=True, top_logprobs=2))
    assert ask.sampling == {"logprobs": 2, "logit_bias": {5: 1.5, 6: float("-inf")}}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(read_chat(body(response_format=wanted)).sampling["json_schema"]) == schema
    assert read_chat(body(response_format={"type": "json_object"})).sampling == {
        "json_schema": '{"type": "object"}'
    }
    assert read_chat(body(logprobs=False)).sampling == {}
    two = json.dumps({"model": "faq", "prompt": "x", "logprobs": 2}).encode()
    assert read_completion(two).sampling == {"logprobs": 2}


def test_both_words_for_the_longest_answer_are_known() -> None:
    assert read_chat(body(max_tokens=5)).sampling == {"max_tokens": 5}
    assert read_chat(body(max_completion_tokens=6)).sampling == {"max_tokens": 6}


def test_seeds_of_64_bits_become_seeds_that_llama_cpp_takes() -> None:
    assert read_chat(body(seed=2**40 + 3)).sampling == {"seed": 3}
    assert read_chat(body(seed=-1)).sampling == {"seed": 2**32 - 1}


def test_characters_beyond_the_first_plane_may_be_escaped_as_json_does() -> None:
    assert "\\ud83e" in body(user="🦙").decode()
    assert read_chat(body(user="🦙", dry_sequence_breakers=["\n"])).sampling == {
        "dry_sequence_breakers": ["\n"]
    }


def test_text_parts_are_joined_and_a_developer_is_the_system() -> None:
    ask = read_chat(
        body(
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            ]
        )
    )
    assert list(ask.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
    ]


def test_what_changes_nothing_may_be_sent() -> None:
    read_chat(body(user="me", n=1, tools=[], logprobs=False, seed=None))
    read_chat(body(response_format={"type": "text"}, stream_options={"include_usage": True}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {"type": "function"}}, "tools"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "tool", "tool_call_id": 1}]}, "messages[0].tool_call_id"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "grammar": "x"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": "x"}},
         "response_format.json_schema.schema"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"dry_sequence_breakers": "x"}, "dry_sequence_breakers"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"stream_options": {"continuous_usage_stats": True}},
         "stream_options.continuous_usage_stats"),
        ({"temprature": 0.5}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 5}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0]"),
        ({"model": ""}, "model"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_obeyed_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_chat(body(**fields))
    assert refused.value.violations[0].field == param


def test_a_name_that_is_nearly_right_is_told() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'repeat_penalty'"):
        read_chat(body(repetition_penalty=1.1))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, body(user="\ud800"), body(**{"\udfff": 1}),
     b'{"model": "\xed\xa0\x80"}'],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        read_chat(data)


def test_a_completion_takes_one_prompt_or_several() -> None:
    one = json.dumps({"model": "faq", "prompt": "Once"}).encode()
    assert read_completion(one).prompts == ("Once",)
    two = json.dumps({"model": "faq", "prompt": ["Once", "Twice"]}).encode()
    assert read_completion(two).prompts == ("Once", "Twice")
    for prompt in ([1, 2, 3], [], None, ["x"] * 65):
        with pytest.raises(InvalidArgument):
            read_completion(json.dumps({"model": "faq", "prompt": prompt}).encode())
    many = {"model": "faq", "prompt": ["x"] * 33, "n": 2}
    with pytest.raises(InvalidArgument, match="for all prompts together"):
        read_completion(json.dumps(many).encode())


def test_choices_have_seeds_of_their_own_that_repeat() -> None:
    assert read_chat(body(n=3)).samplings() == [{}, {}, {}]
    ask = read_chat(body(n=2, seed=2**32 - 1, top_k=5))
    assert ask.samplings() == [{"top_k": 5, "seed": 2**32 - 1}, {"top_k": 5, "seed": 0}]


def test_tools_and_what_was_called_go_on() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "17", "tool_call_id": "c1", "name": "weather"},
    ]
    ask = read_chat(body(tools=tools, messages=messages))
    assert list(ask.tools) == tools
    assert ask.messages[1] == {"role": "assistant", "tool_calls": [call]}
    assert ask.messages[2] == messages[2]
    assert read_chat(body(tools=tools, tool_choice="none")).tools == ()
