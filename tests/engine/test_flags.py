import msgspec
import pytest

from promptai.engine.flags import EngineFlags, newer_switches

FLAGS = EngineFlags(model="/models/yi-coder-1.5b.Q4_0.gguf", port=8091, threads=4, context=4096)


def pairs(argv: list[str]) -> dict[str, str | None]:
    """Options with their values; switches with None."""
    return {
        name: None if value.startswith("--") else value
        for name, value in zip(argv, [*argv[1:], "--"], strict=True)
        if name.startswith("--")
    }


@pytest.mark.parametrize(
    "text",
    [
        b'{"model": "m", "port": 1, "threads": 1, "context": 1, "gpu_layers": 99}',
        b'{"model": "m", "port": 1, "threads": 1}',
        b'{"model": "m", "port": "1", "threads": 1, "context": 1}',
    ],
    ids=["unknown", "missing", "text"],
)
def test_rejects_invalid_flags(text: bytes) -> None:
    """The embedded engine reads them as JSON, and a manifest stores them."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=EngineFlags)


def test_every_relevant_flag_is_on_the_command_line() -> None:
    """llama-server's own defaults suit a workstation."""
    assert pairs(FLAGS.to_argv()) == {
        "--model": "/models/yi-coder-1.5b.Q4_0.gguf",
        "--alias": "yi-coder-1.5b.Q4_0",
        "--host": "127.0.0.1",
        "--port": "8091",
        "--threads": "4",
        "--threads-batch": "4",
        "--ctx-size": "4096",
        "--parallel": "1",
        "--batch-size": "512",
        "--ubatch-size": "512",
        "--cache-type-k": "f16",
        "--cache-type-v": "f16",
        "--cache-ram": "0",
        "--metrics": None,
        "--slots": None,
        "--no-webui": None,
        "--offline": None,
    }


@pytest.mark.parametrize(
    ("field", "value", "option", "expected"),
    [
        ("model", "/m/other.gguf", "--model", "/m/other.gguf"),
        ("port", 9, "--port", "9"),
        ("threads", 3, "--threads-batch", "3"),
        ("context", 77, "--ctx-size", "77"),
        ("slots", 2, "--parallel", "2"),
        ("batch", 64, "--batch-size", "64"),
        ("ubatch", 32, "--ubatch-size", "32"),
        ("cache_type_k", "q8_0", "--cache-type-k", "q8_0"),
        ("cache_type_v", "bf16", "--cache-type-v", "bf16"),
        ("cache_ram_mib", 100, "--cache-ram", "100"),
        ("mmap", False, "--no-mmap", None),
    ],
    ids=["model", "port", "threads", "context", "slots", "batch", "ubatch", "type-k", "type-v", "cache-ram", "mmap"],
)
def test_each_field_sets_its_option(field: str, value: object, option: str, expected: str | None) -> None:
    argv = msgspec.structs.replace(FLAGS, **{field: value}).to_argv()

    assert expected == pairs(argv)[option]


@pytest.mark.parametrize(
    ("model", "alias"),
    [
        ("/models/yi-coder.gguf", "yi-coder"),
        ("../yi.coder.Q4_0.gguf", "yi.coder.Q4_0"),
        ("yi", "yi"),
        ("/a b/ü.gguf", "ü"),
    ],
)
def test_the_alias_is_never_a_path(model: str, alias: str) -> None:
    """Clients and reports must not see where files are stored."""
    assert alias == msgspec.structs.replace(FLAGS, model=model).alias
    assert "/" not in alias


@pytest.mark.parametrize(
    ("help_text", "expected"),
    [
        ("", ()),
        ("-c,    --ctx-size N   size of the prompt context\n--no-mmap  do not memory-map\n", ()),
        ("-fit,  --fit [on|off]   whether to adjust unset arguments\n", ("--fit", "off")),
        ("-fitt, --fit-target MiB0\n--fit-ctx N\n", ()),
        ("--context-shift, --no-context-shift   whether to shift\n", ("--no-context-shift",)),
        (
            "-fit,  --fit [on|off]\n-lm,   --load-mode MODE\n",
            ("--fit", "off", "--load-mode", "mmap"),
        ),
    ],
    ids=["mute", "2024", "fit", "only-its-relatives", "shift", "2026"],
)
def test_adds_only_switches_that_the_help_names(help_text: str, expected: tuple[str, ...]) -> None:
    """A build exits at an unknown switch."""
    assert expected == newer_switches(help_text)


@pytest.mark.parametrize(
    ("command", "mmap", "expected"),
    [
        (("s",), True, ["s"]),
        (("s",), False, ["s", "--no-mmap"]),
        (("s", "--load-mode", "mmap"), True, ["s", "--load-mode", "mmap"]),
        (("s", "--load-mode", "mmap", "--fit", "off"), False, ["s", "--load-mode", "none", "--fit", "off"]),
    ],
)
def test_disables_mapping_with_the_builds_own_option(
    command: tuple[str, ...], *, mmap: bool, expected: list[str]
) -> None:
    """Newer builds reject the older option."""
    argv = msgspec.structs.replace(FLAGS, mmap=mmap).to_argv(command)

    assert expected == argv[: argv.index("--model")]
