"""Every sampler does something, the same each time for a seed; grammars are obeyed."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import InvalidArgument
from arriero.llama import Batch, Context, Model
from arriero.llama.grammar import from_json_schema, nesting
from arriero.llama.sampler import Sampler, Sampling

PROMPT = [1, *range(260, 280)]


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def context(model: Model) -> Iterator[Context]:
    with Context(model, n_ctx=256, n_threads=1) as made:
        yield made


def decode(context: Context, tokens: list[int], start: int = 0) -> int:
    batch = Batch(len(tokens))
    row = batch.extend(tokens, start=start, sequence=0)[-1]
    context.decode(batch)
    return row


def make(model: Model, context: Context, sampling: Sampling, count: int = 24) -> list[int]:
    """Tokens that follow the prompt."""
    sampling.check()
    context.remove(0)
    row = decode(context, PROMPT)
    sampler = Sampler(sampling, model, PROMPT, window=context.n_ctx)
    made: list[int] = []
    try:
        while len(made) < count:
            made.append(sampler.sample(context, row))
            if made[-1] in model.eog:
                break
            row = decode(context, [made[-1]], len(PROMPT) + len(made) - 1)
    finally:
        sampler.close()
    return made


def text(model: Model, tokens: list[int]) -> str:
    return model.detokenize([token for token in tokens if token not in model.eog])


HOT = {"temperature": 1.5, "seed": 3}


@pytest.mark.parametrize(
    "knobs",
    [
        {"top_k": 1},
        {"top_p": 0.05},
        {"min_p": 0.9},
        {"typical_p": 0.05},
        {"repeat_penalty": 5.0},
        {"presence_penalty": 20.0},
        {"frequency_penalty": 20.0},
        {"mirostat": 1, "mirostat_tau": 0.5},
        {"mirostat": 2, "mirostat_tau": 0.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.001},
        {"logit_bias": {300: 50.0}},
        {"seed": 4},
    ],
    ids="-".join,
)
def test_each_knob_changes_what_is_made_and_a_seed_repeats_it(
    model: Model, context: Context, knobs: dict
) -> None:
    # Wide open, so that each knob alone has something to narrow.
    base = Sampling(**{**HOT, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    changed = Sampling(**{**HOT, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **knobs})
    made = make(model, context, changed)
    assert made == make(model, context, changed)
    assert made != make(model, context, base)


def test_greedy_takes_the_likeliest_and_penalties_count_the_prompt(
    model: Model, context: Context
) -> None:
    greedy = make(model, context, Sampling(temperature=0), 1)
    context.remove(0)
    logits = context.logits(decode(context, PROMPT)).copy()
    assert greedy == [int(logits.argmax())]
    # Forbid what greedy would take, as if the prompt had said it.
    seen = Sampler(
        Sampling(temperature=0, presence_penalty=100.0), model, [*PROMPT, *greedy], window=256
    )
    row = len(PROMPT) - 1
    penalised = logits.copy()
    penalised[[*set(PROMPT), *greedy]] -= 100.0
    assert seen.sample(context, row) == int(penalised.argmax())
    seen.close()


def test_dry_breaks_a_sequence_that_repeats(model: Model, context: Context) -> None:
    loop = PROMPT[:8] * 3
    plain = Sampling(temperature=0, logit_bias={PROMPT[0]: 1000.0})
    dry = Sampling(temperature=0, logit_bias={PROMPT[0]: 1000.0}, dry_multiplier=100.0,
                   dry_base=4.0)  # fmt: skip
    context.remove(0)
    row = decode(context, loop)
    made = []
    for sampling in (plain, dry):
        sampler = Sampler(sampling, model, loop, window=256)
        made.append(sampler.sample(context, row))
        sampler.close()
    assert made[0] == PROMPT[0]  # the loop goes on
    assert made[1] != PROMPT[0]


def test_a_forbidden_token_and_ignored_ends_never_come(model: Model, context: Context) -> None:
    (first,) = make(model, context, Sampling(temperature=0), 1)
    assert make(model, context, Sampling(temperature=0, logit_bias={first: -math.inf}), 1) != [
        first
    ]
    end = next(iter(model.eog))
    wanted = Sampling(temperature=0, logit_bias={end: 1000.0})
    assert make(model, context, wanted) == [end]
    ignoring = Sampling(temperature=0, logit_bias={end: 1000.0}, ignore_eos=True)
    assert len(make(model, context, ignoring)) == 24


def test_log_probabilities_are_those_of_the_logits(model: Model, context: Context) -> None:
    context.remove(0)
    row = decode(context, PROMPT)
    logits = context.logits(row).astype(np.float64)
    expected = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    sampler = Sampler(Sampling(temperature=0, logprobs=5), model)
    token = sampler.sample(context, row)
    told = sampler.logprobs(context, row, token)
    assert told is not None
    assert told.chosen == pytest.approx(expected[token], abs=1e-4)
    assert [i for i, _ in told.top] == list(np.argsort(-logits, kind="stable")[:5])
    assert [p for _, p in told.top] == pytest.approx(sorted(expected)[::-1][:5], abs=1e-4)
    assert Sampler(Sampling(temperature=0), model).logprobs(context, row, token) is None


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_grammar_is_obeyed_to_its_end(model: Model, context: Context, temperature: float) -> None:
    grammar = 'root ::= "yes, " ("llama" | "alpaca") "!"'
    sampling = Sampling(temperature=temperature, seed=5, grammar=grammar)
    assert text(model, make(model, context, sampling, 60)) in {"yes, llama!", "yes, alpaca!"}


def test_a_json_schema_makes_json_that_it_describes(model: Model, context: Context) -> None:
    schema = {
        "type": "object",
        "properties": {"herd": {"enum": ["llama", "alpaca"]}, "old": {"type": "boolean"}},
        "required": ["herd", "old"],
        "additionalProperties": False,
    }
    grammar = from_json_schema(json.dumps(schema))
    sampling = Sampling(temperature=1.0, seed=2, grammar=grammar)
    found = json.loads(text(model, make(model, context, sampling, 200)))
    assert found["herd"] in ("llama", "alpaca")
    assert isinstance(found["old"], bool)


@pytest.mark.parametrize("grammar", ["root ::= (", 'other ::= "a"', "root ::= root root"])
def test_a_grammar_that_cannot_be_compiled_is_refused(model: Model, grammar: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Sampler(Sampling(grammar=grammar), model)
    assert refused.value.violations[0].field == "sampling.grammar"


@pytest.mark.parametrize(
    "schema", ["{", '{"$ref": "https://example.org/schema"}', '{"type": "llama"}', "[" * 5000]
)
def test_a_schema_that_is_none_is_refused(schema: str) -> None:
    with pytest.raises(InvalidArgument):
        from_json_schema(schema)


def says(model: Model, schema: object, text: str) -> bool:
    """Whether a schema's grammar allows a whole text, and its end."""
    grammar = from_json_schema(json.dumps(schema))
    sampler = Sampler(Sampling(grammar=grammar), model)
    pieces = model.pieces(special=False)
    try:
        for token in [pieces.index(character.encode()) for character in text]:
            if not sampler._allowed(token):
                return False
            sampler._c.llama_sampler_accept(sampler._grammar, token)
        return any(sampler._allowed(end) for end in model.eog)
    finally:
        sampler.close()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (1, 5), (0, 150), (-3, 12), (-120, -7), (95, 1203), (999, 1000)]
)
def test_integers_stay_between_the_bounds_of_their_schema(
    model: Model, low: int, high: int
) -> None:
    schema = {"type": "integer", "minimum": low, "exclusiveMaximum": high + 1}
    for number in {low, high, low + 1, high - 1, (low + high) // 2, low - 1, high + 1, 0, 10, 99}:
        assert says(model, schema, str(number)) == (low <= number <= high), number


def test_a_bound_alone_leaves_the_other_side_open(model: Model) -> None:
    assert says(model, {"type": "integer", "minimum": 18}, "123456")
    assert not says(model, {"type": "integer", "minimum": 18}, "17")
    assert says(model, {"type": "integer", "maximum": -2}, "-77")
    assert not says(model, {"type": "integer", "maximum": -2}, "-1")


def test_what_may_be_null_keeps_what_else_its_schema_says(model: Model) -> None:
    text = {"type": ["string", "null"], "maxLength": 2}
    assert says(model, text, "null")
    assert says(model, text, '"ab"')
    assert not says(model, text, '"abc"')
    listed = {"type": ["string", "null"], "enum": ["a", None]}
    assert says(model, listed, "null")
    assert not says(model, listed, '"b"')
    color = {"$defs": {"c": {"enum": ["red"]}}, "allOf": [{"$ref": "#/$defs/c"}], "default": "red"}
    assert says(model, color, '"red"')
    assert not says(model, color, "{}")


def test_json_may_be_written_in_lines_and_in_one(model: Model) -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for text in ('{"a":1}', '{ "a": 1 }', '{\n  "a": 1\n}', '{\n\t"a": 1\n}'):
        assert says(model, schema, text)
    assert not says(model, schema, '{\n\n\n"a": 1}')


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"type": "number", "minimum": 0}}}, "bounds of numbers"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer"),
        ({"type": "string", "maxLength": 10**8}, "maxLength"),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 10**9}, "maxItems"),
        ({"type": "string", "pattern": "^a{1000000000}$"}, "pattern"),
        ({"properties": {f"p{i}" * 20: {"minLength": 999, "type": "string"} for i in range(99)}},
         "more than"),
    ],
)  # fmt: skip
def test_a_schema_that_a_grammar_cannot_obey_is_refused_before_it_costs(
    schema: object, word: str
) -> None:
    with pytest.raises(InvalidArgument, match=word):
        from_json_schema(json.dumps(schema))


def test_a_grammar_that_would_overflow_the_stack_is_refused(model: Model) -> None:
    assert nesting('root ::= ("(" [(] (x)) # ((((\nx ::= "\\"("') == 2
    deep = "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000
    with pytest.raises(InvalidArgument, match="nested 100000 deep"):
        Sampler(Sampling(grammar=deep), model)


def test_a_window_beyond_the_context_takes_no_memory(model: Model, context: Context) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide = {"repeat_penalty": 1.3, "repeat_last_n": 1 << 30}
    wide |= {"dry_multiplier": 0.8, "dry_penalty_last_n": 1 << 30}
    narrow = wide | {"repeat_last_n": -1, "dry_penalty_last_n": -1}
    assert make(model, context, Sampling(temperature=0, **wide)) == make(  # type: ignore[arg-type]
        model,
        context,
        Sampling(temperature=0, **narrow),  # type: ignore[arg-type]
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("top_p", 1.5),
        ("typical_p", -0.1),
        ("repeat_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("mirostat", 3),
        ("repeat_last_n", -2),
        ("dry_base", 0.5),
        ("xtc_probability", 2.0),
        ("logprobs", 21),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: 1e300}),
        ("grammar", "x" * 300_000),
        ("grammar", "\0"),
    ],
)
def test_values_without_meaning_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Sampling(**{name: value}).check()  # type: ignore[arg-type]
    assert refused.value.violations[0].field.startswith(f"sampling.{name}")


def test_a_bias_of_a_token_that_does_not_exist_is_refused(model: Model) -> None:
    with pytest.raises(InvalidArgument, match="no such token"):
        Sampler(Sampling(logit_bias={10**6: 1.0}), model)


def test_greedy_biases_count_and_leave_log_probabilities_alone(
    model: Model, context: Context
) -> None:
    context.remove(0)
    row = decode(context, PROMPT)
    before = context.logits(row).copy()
    first, second = (int(i) for i in np.argsort(-before)[:2])
    for biases, token in (
        ({first: -math.inf}, second),
        ({first: -1e6, second: -1e6, 300: 50.0}, 300),
        ({first: 1.0, 300: 0.0}, first),
    ):
        sampling = Sampling(temperature=0, logit_bias=biases, logprobs=1)
        sampler = Sampler(sampling, model, PROMPT)
        assert sampler.sample(context, row) == token
        told = sampler.logprobs(context, row, token)
        assert told is not None
        assert told.top[0][0] == first
        sampler.close()
    assert np.array_equal(context.logits(row), before)
