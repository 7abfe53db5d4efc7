"""Bodies as OpenAI's API has them."""

from arriero.errors import FieldViolation, InvalidArgument, NotFound
from arriero.gateway.answers import Answer, Choice, error_body
from arriero.v1.inference_pb2 import TokenLogprob


def test_errors_name_the_parameter_that_the_client_sent() -> None:
    found = error_body(InvalidArgument.field("sampling.top_p", "2.0 is out of range"))["error"]
    assert (found["param"], found["message"]) == ("top_p", "top_p: 2.0 is out of range")
    assert error_body(InvalidArgument.field("texts[3]", "x"))["error"]["param"] == "input[3]"
    schema = InvalidArgument.field("sampling.json_schema", "is nested too deeply")
    assert error_body(schema)["error"]["param"] == "response_format"
    assert error_body(InvalidArgument.field("messages[0]", "x"))["error"]["param"] == "messages[0]"


def test_errors_that_clients_act_on_have_openais_codes() -> None:
    long = InvalidArgument(
        "prompt: too long",
        violations=[FieldViolation("prompt", "too long")],
        reason="CONTEXT_LENGTH_EXCEEDED",
    )
    assert error_body(long)["error"]["code"] == "context_length_exceeded"
    assert error_body(NotFound("no endpoint"))["error"]["code"] == "model_not_found"


def test_tokens_of_a_completion_say_where_their_text_begins_also_in_parts() -> None:
    told = [TokenLogprob(piece=piece, logprob=-1) for piece in (b" a", b"bcd", b"e")]
    answer = Answer("faq", chat=False)
    whole = answer.whole([Choice(0, text=" abcde", logprobs=told)], 1)
    assert whole["choices"][0]["logprobs"]["text_offset"] == [0, 2, 5]
    choice = Choice(0)
    parts = [answer.part(choice, "", logprobs=[one]) for one in told]
    offsets = [part["choices"][0]["logprobs"]["text_offset"] for part in parts]
    assert offsets == [[0], [2], [5]]


def test_a_prompt_of_several_choices_is_counted_once_and_so_is_what_was_cached() -> None:
    choices = [Choice(i, prompt_tokens=9, cached_tokens=8 * (i > 0)) for i in range(4)]
    usage = Answer("faq", chat=True).whole(choices, 4)["usage"]
    assert usage["prompt_tokens"] == 9
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
