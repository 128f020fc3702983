import msgspec
import pytest

from promptai.wire.llamaserver import Completion, GenerationSettings, Props, Slot, Timings, TokenProbability, Tokens

PROPS_2024 = b"""{"system_prompt": "", "default_generation_settings": {"n_ctx": 4096, "n_predict": -1,
    "model": "models/yi-coder-1.5b.gguf", "seed": 4294967295, "temperature": 0.8, "samplers": ["top_k"]},
    "total_slots": 4, "chat_template": "chatml"}"""
PROPS_2026 = b"""{"default_generation_settings": {"params": {"seed": 4294967295, "top_k": 40}, "n_ctx": 256},
    "total_slots": 1, "model_alias": "s", "model_ftype": "Q4_0", "model_path": "s.gguf", "modalities": {},
    "endpoint_slots": true, "ui_settings": {}, "build_info": "b11434-0c1e570", "chat_template": "{%- for m in x -%}"}"""
TIMINGS_2024 = b"""{"prompt_n": 11, "prompt_ms": 98.5, "prompt_per_token_ms": 8.95, "prompt_per_second": 111.6,
    "predicted_n": 3, "predicted_ms": 60, "predicted_per_token_ms": 20.0, "predicted_per_second": 50.0}"""
COMPLETION_2026 = b"""{"index": 0, "content": "l", "tokens": [], "stop": true, "stop_type": "limit", "tokens_cached": 2,
    "timings": {"cache_n": 0, "prompt_n": 2, "prompt_ms": 0.299, "predicted_n": 1, "predicted_ms": 0.001},
    "completion_probabilities": [{"id": 108, "token": "l", "bytes": [108], "logprob": -6.306850910186768,
    "top_logprobs": [{"id": 507, "token": "tok249", "bytes": [116], "logprob": -5.8}]}]}"""


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        pytest.param(Props, b'{"total_slots": "4"}', id="slots-as-text"),
        pytest.param(Props, b'{"default_generation_settings": null}', id="settings-null"),
        pytest.param(Props, b'{"model_alias": ["a"]}', id="alias-list"),
        pytest.param(Props, b"[]", id="props-list"),
        pytest.param(Slot, b'{"is_processing": false}', id="slot-without-id"),
        pytest.param(Slot, b'{"id": 0, "is_processing": 1}', id="processing-number"),
        pytest.param(Tokens, b'{"tokens": [{"id": 1, "piece": "a"}]}', id="tokens-with-pieces"),
        pytest.param(Tokens, b'{"tokens": [1.5]}', id="token-fraction"),
        pytest.param(Timings, b'{"prompt_n": 1, "prompt_ms": 1.0, "predicted_n": 1}', id="timings-incomplete"),
        pytest.param(
            Timings,
            b'{"prompt_n": 1, "prompt_ms": null, "predicted_n": 1, "predicted_ms": 1}',
            id="milliseconds-null",
        ),
        pytest.param(
            Completion,
            b'{"content": "l", "completion_probabilities": [{"content": "l", "probs": [{"tok_str": "l", "prob": 1}]}]}',
            id="probabilities-of-2024",
        ),
        pytest.param(Completion, b'{"content": null}', id="content-null"),
    ],
)
def test_rejects_wrong_types(kind: type[msgspec.Struct], answer: bytes) -> None:
    """An error, never a guess."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(answer, type=kind)


@pytest.mark.parametrize(
    ("answer", "props"),
    [
        pytest.param(b"{}", Props(total_slots=1, build_info=None), id="says-nothing"),
        pytest.param(
            PROPS_2024,
            Props(total_slots=4, default_generation_settings=GenerationSettings(4096), chat_template="chatml"),
            id="2024",
        ),
        pytest.param(
            PROPS_2026,
            Props(1, GenerationSettings(256), "s", "s.gguf", "Q4_0", "b11434-0c1e570", "{%- for m in x -%}"),
            id="2026",
        ),
    ],
)
def test_reads_props_of_several_builds(answer: bytes, props: Props) -> None:
    """A field that a build does not send is None, never 0."""
    assert props == msgspec.json.decode(answer, type=Props)


def test_timings_without_a_cache_count_are_unknown() -> None:
    """None, because 0 would be a claim."""
    assert Timings(11, 98.5, 3, 60.0, cache_n=None) == msgspec.json.decode(TIMINGS_2024, type=Timings)


def test_reads_the_raw_log_probability_of_a_completion() -> None:
    completion = msgspec.json.decode(COMPLETION_2026, type=Completion)

    assert completion.completion_probabilities == [
        TokenProbability(108, -6.306850910186768, [TokenProbability(507, -5.8)])
    ]
    assert completion.timings == Timings(2, 0.299, 1, 0.001, cache_n=0)


def test_reads_slots_with_unknown_fields() -> None:
    """A busy slot of 2024 with its request, and an idle one of 2026."""
    answer = (
        b'[{"id": 0, "n_ctx": 4096, "is_processing": true, "params": {"n_predict": -1}, "next_token": {"n_remain": 5}},'
        b'{"id": 1, "n_ctx": 256, "speculative": false, "is_processing": false}]'
    )

    expected = [Slot(0, is_processing=True, n_ctx=4096), Slot(1, n_ctx=256)]
    assert expected == msgspec.json.decode(answer, type=list[Slot])
