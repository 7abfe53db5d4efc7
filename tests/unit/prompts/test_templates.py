import json

import pytest

from arriero import prompts
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.prompts import Template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Name a river."}
ANSWER = {"role": "assistant", "content": "The Urubamba."}


def render(name: str, messages: list[dict[str, str]], prompt: bool = False) -> str:
    return prompts.load(name).render(messages, add_generation_prompt=prompt, **TOKENS)


def test_the_shipped_templates_are_known() -> None:
    assert prompts.known() == [
        *("alpaca", "alpaca-no-input", "chatml", "chinese-alpaca-2", "llama-2", "llama-3"),
        "vicuna",
    ]


def test_alpaca_without_input_is_the_papers_text() -> None:
    assert render("alpaca", [USER, ANSWER]) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a river.\n\n### Response:\nThe Urubamba.</s>"
    )


def test_alpaca_with_input_is_the_papers_text() -> None:
    assert render("alpaca", [USER | {"input": "In Peru"}], prompt=True) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a river.\n\n### Input:\nIn Peru\n\n### Response:\n"
    )


def test_alpaca_without_input_section_has_it_below_the_instruction() -> None:
    assert render("alpaca-no-input", [USER | {"input": "In Peru"}, ANSWER]) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a river.\nIn Peru\n\n### Response:\nThe Urubamba.</s>"
    )
    assert render("alpaca-no-input", [USER, ANSWER]) == render("alpaca", [USER, ANSWER])


def test_llama_3() -> None:
    assert render("llama-3", [{"role": "system", "content": "Be brief."}, USER], prompt=True) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName a river.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml() -> None:
    assert render("chatml", [{"role": "system", "content": "Be brief."}, USER], prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama_2_of_two_turns() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert render("llama-2", [system, USER, ANSWER, USER], prompt=True) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a river. [/INST] The Urubamba. </s>"
        "<s>[INST] Name a river. [/INST]"
    )


def test_chinese_alpaca_2_brings_its_system_text() -> None:
    assert render("chinese-alpaca-2", [USER | {"input": "秘鲁"}, ANSWER]) == (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
        "Name a river.\n秘鲁 [/INST] The Urubamba.</s>"
    )


def test_vicuna_of_two_turns() -> None:
    assert render("vicuna", [USER, ANSWER, USER], prompt=True).endswith(
        "questions. USER: Name a river. ASSISTANT: The Urubamba.</s>USER: Name a river. ASSISTANT:"
    )


@pytest.mark.parametrize("name", prompts.known())
@pytest.mark.parametrize("extra", [{}, {"input": "In Peru"}])
def test_the_prompt_begins_the_whole_text(name: str, extra: dict[str, str]) -> None:
    whole = render(name, [USER | extra, ANSWER])
    prompt = render(name, [USER | extra], prompt=True)
    assert whole.startswith(prompt)
    assert whole != prompt


@pytest.mark.parametrize("name", prompts.known())
def test_declared_facts_are_true_of_what_is_rendered(name: str) -> None:
    template = prompts.load(name)
    whole = render(name, [USER, ANSWER])
    assert template.bind(**TOKENS).writes_bos == template.writes_bos
    assert whole.rstrip().endswith(template.end_text("</s>"))
    if template.system is not None:
        # The Jinja stands alone in a GGUF file: it brings the system text itself.
        from arriero.prompts import sandbox

        variables = {"messages": [USER, ANSWER], "add_generation_prompt": False, **TOKENS}
        assert sandbox.render(template.chat_template, variables) == whole


def test_binding_to_a_tokenizer_whose_bos_the_text_begins_with() -> None:
    bound = prompts.load("chatml").bind(bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert bound.writes_bos


def test_a_models_own_template_is_read_off_its_rendering() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|eot|>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    bound = prompts.load("model", source).bind(**TOKENS)
    assert (bound.writes_bos, bound.end_of_turn, bound.stop) == (True, "<|eot|>", ("<|eot|>",))


def test_a_models_template_that_ends_turns_with_eos() -> None:
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    bound = prompts.load("model", source).bind(**TOKENS)
    assert (bound.writes_bos, bound.end_of_turn, bound.stop) == (False, "eos", ())


def test_a_template_that_does_not_read_input_gets_it_in_the_content() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    text = prompts.load("model", source).render([USER | {"input": "In Peru"}], **TOKENS)
    assert text == "user: Name a river.\nIn Peru\n"


def test_the_default_system_text_comes_in_where_none_is_given() -> None:
    template = Template("t", "{% for m in messages %}{{ m.role }};{% endfor %}", system="Hi.")
    assert template.render([USER], **TOKENS) == "system;user;"
    system = {"role": "system", "content": "Other."}
    assert template.render([system, USER], **TOKENS) == "system;user;"


def test_a_template_survives_its_file(tmp_path) -> None:
    template = prompts.load("chinese-alpaca-2")
    template.write(tmp_path)
    assert Template.read(tmp_path) == template
    assert prompts.load(tmp_path / prompts.FILE_NAME) == template
    assert Template.read(tmp_path / "elsewhere") is None


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match=r"did you mean 'alpaca'.*chatml") as caught:
        prompts.load("alpacca")
    assert caught.value.violations[0].field == "template"


def test_a_model_without_chat_template_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="brings no chat template"):
        prompts.load("model")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ({"name": "x"}, "no 'chat_template'"),
        ({"name": "x", "chat_template": "a", "stops": []}, "did you mean 'stop'"),
        ({"name": "x", "chat_template": "a", "stop": [1]}, "non-empty texts"),
        ({"name": "x", "chat_template": "a", "writes_bos": "yes"}, "true or false"),
        ({"name": "x", "chat_template": "a", "end_of_turn": ""}, "'end_of_turn' is empty"),
        ({"name": "x", "chat_template": "{% if"}, "Jinja does not accept"),
    ],
)
def test_files_that_are_no_template_are_refused(data, words: str) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    with pytest.raises(InvalidArgument, match=words):
        Template.from_json(text)


def test_a_newer_template_format_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="update Arriero"):
        Template.from_json('{"format": 99, "name": "x", "chat_template": "a"}')


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([USER, {"role": "assistant", "content": 3}], "messages[1].content"),
        ([USER | {"input": 3}], "messages[0].input"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        render("alpaca", messages)
    assert caught.value.violations[0].field == field
