"""``promptai serve`` right after installation: the real engine, the bundled model."""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from promptai.cli.serve import ServeOptions, _with_options
from promptai.settings import EngineSettings, ServeEntry, Settings
from support_cli import ONE_THREAD, alive, children_of, clean_environment, promptai, simulated, wait_for
from support_gateway_process import QUESTION, Served, serving

pytestmark = pytest.mark.real

#: A board that needs five seconds for an answer of seventy tokens.
SLOW = ("--decode-tps", "14", "--slots", "2")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The bundled model on the real engine."""
    with serving(*ONE_THREAD, cwd=tmp_path_factory.mktemp("serve")) as served:
        served.ready()
        yield served


def test_the_printed_curl_line_works(gateway: Served) -> None:
    done = subprocess.run(
        ["bash", "-c", gateway.line("curl ")], check=True, capture_output=True, text=True, env=clean_environment()
    )

    answer = json.loads(done.stdout)
    assert answer["model"] == "promptai-tiny"
    assert len(answer["choices"][0]["message"]["content"]) > 20


def test_the_official_client_gets_whole_answers_and_streams(gateway: Served) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(
            model="promptai-tiny", messages=[{"role": "user", "content": "What is a mast?"}], max_tokens=12, seed=1
        )
        chunks = list(
            client.chat.completions.create(
                model="promptai-tiny",
                messages=[{"role": "user", "content": "What is a mast?"}],
                max_tokens=12,
                seed=1,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        listed = [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError, match="did you mean promptai-tiny"):
            client.chat.completions.create(model="promptai-tinny", messages=[{"role": "user", "content": "x"}])

    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == streamed
    assert len(streamed) > 5
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert listed == ["promptai-tiny"]


def test_logs_a_line_per_request_and_no_prompt(gateway: Served) -> None:
    word = "xylophone"
    before = len(gateway.logged)

    gateway.chat(messages=[{"role": "user", "content": f"{word} mast"}])

    wait_for(lambda: len(gateway.logged) > before, what="a line of the log")
    line = gateway.logged[-1]
    assert "model=promptai-tiny replica=local/promptai-tiny status=200" in line
    assert word not in "\n".join(gateway.logged)


def test_a_port_in_use_is_a_one_line_error_and_starts_no_engine(gateway: Served, tmp_path: Path) -> None:
    port = gateway.url.rpartition(":")[2]

    done = promptai("serve", "--port", port, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"promptai: error: port {port} on 127.0.0.1 is taken by another program (choose another with --port)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "word"),
    [
        (("absent-model",), "", 3, "no model named 'absent-model'"),
        (("http://pi-1:8080",), "", 2, "is a server, not a model (pass it with --board"),
        (("--board", "pi-1"), "", 2, "'pi-1' is not an engine URL (write it as http://host:port)"),
        (("--config", "absent.toml"), "", 2, "settings absent.toml cannot be read"),
        ((), "[gateway]\nprot = 1", 2, "unknown field `prot` - at `$.gateway` (did you mean port?)"),
        ((), "[gateway]\nattempts = 0", 2, "gateway.attempts must be above 0, not 0"),
        ((), "[[fleet]]\nurl = 'http://a:1'\napi_key = 'x'", 2, "unknown field `api_key`"),
        (
            (),
            "[[fleet]]\nurl = 'http://a:1'\napi_key_env = 'NOT_SET'",
            2,
            "$NOT_SET, the API key of http://a:1, is not set",
        ),
        ((), "[[serve]]\nmodel = 'a.gguf'", 3, "model a.gguf does not exist"),
        (("--host", "192.0.2.1"), "", 2, "192.0.2.1 is not an address of this machine"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_invalid_input_is_a_one_line_error(
    tmp_path: Path, arguments: tuple[str, ...], settings: str, code: int, word: str
) -> None:
    (tmp_path / "promptai.toml").write_text(settings)

    done = promptai("serve", "--port", "0", *arguments, cwd=tmp_path, PROMPTAI_KEYS=str(tmp_path / "keys.json"))

    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done.stderr
    assert word in done.stderr.replace(f"{tmp_path}/", "")


def test_sigterm_drains_and_ends_the_engine(tmp_path: Path) -> None:
    with serving(*ONE_THREAD, cwd=tmp_path) as served:
        served.ready()
        engines = children_of(served.process.pid, "promptai.engine")
        answer = served.stream(max_tokens=2000, ignore_eos=True)
        answer.until_first_text()
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: served.get("/readyz")[0] == 503, what="the end of taking")
        refused = served.chat()

        assert answer.whole()
        assert served.wait() == 0

    assert answer.reason == "length"
    assert (refused[0], refused[1]["error"]["code"]) == (503, "draining")
    assert engines
    wait_for(lambda: not any(map(alive, engines)), what="the engine's end", seconds=5)


def test_a_second_ctrl_c_stops_at_once_and_leaves_no_engine(tmp_path: Path) -> None:
    with serving(*ONE_THREAD, "--quiet", cwd=tmp_path) as served:
        served.ready()
        engines = children_of(served.process.pid, "promptai.engine")
        answer = served.stream(max_tokens=3000, ignore_eos=True)
        answer.until_first_text()
        served.process.send_signal(signal.SIGINT)
        wait_for(lambda: any("draining: 1 requests in progress" in line for line in served.logged), what="draining")
        began = time.monotonic()
        served.process.send_signal(signal.SIGINT)

        assert served.wait() == 130
        assert time.monotonic() - began < 10
        assert not answer.whole()

    wait_for(lambda: not any(map(alive, engines)), what="the engine's end", seconds=5)
    assert not any("/v1/chat" in line for line in served.logged)


@pytest.mark.parametrize("how", ["SIGHUP", "file"])
def test_reloads_settings_during_a_stream(tmp_path: Path, how: str) -> None:
    config = tmp_path / "promptai.toml"
    with simulated(*SLOW, cwd=tmp_path) as board, serving("--board", board, cwd=tmp_path) as served:
        served.ready()
        answer = served.stream(max_tokens=70)
        answer.until_first_text()
        unknown = served.chat(model="short")[0]
        if how == "SIGHUP":
            config.write_text("[aliases.short]\nmodle = 'x'\n")
            served.process.send_signal(signal.SIGHUP)
            wait_for(lambda: any("settings not reloaded" in line for line in served.logged), what="a refusal")
        config.write_text("[aliases.short]\nmodel = 'simulated'\nparams = { max_tokens = 3 }\n")
        if how == "SIGHUP":
            served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("settings reloaded" in line for line in served.logged), what="the reload")
        known = served.get("/v1/models/short")

        assert unknown == 404
        assert (known[0], known[1]["alias_of"]) == (200, "simulated")
        assert not answer.ended
        assert answer.whole()
        assert answer.reason == "length"
        status, short = served.chat(model="short", max_tokens=None)
        assert (status, short["usage"]["completion_tokens"]) == (200, 3)


def test_a_removed_board_finishes_its_stream_while_another_takes_over(tmp_path: Path) -> None:
    config = tmp_path / "promptai.toml"

    def board(url: str, name: str) -> str:
        return f"[[fleet]]\nurl = '{url}'\nname = '{name}'\n"

    with simulated(*SLOW, cwd=tmp_path) as one, simulated("--model", "new", cwd=tmp_path) as two:
        config.write_text(board(one, "one"))
        with serving(cwd=tmp_path) as served:
            served.ready()
            answer = served.stream(max_tokens=70)
            answer.until_first_text()
            config.write_text(board(two, "two"))
            wait_for(lambda: served.states() == {"one": "draining", "two": "ready"}, what="the other board")
            assert served.chat(model="new")[0] == 200
            assert not answer.ended

            assert answer.whole()
            assert answer.reason == "length"
            wait_for(lambda: served.states() == {"two": "ready"}, what="the removed board's end")


def test_a_gateway_for_other_machines_creates_and_requires_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "config" / "promptai" / "keys.json"
    with serving(*ONE_THREAD, "--host", "0.0.0.0", cwd=tmp_path) as served:  # noqa: S104  what is tested
        served.ready()
        key = served.line("API key: ").removeprefix("API key: ")
        curl = subprocess.run(["bash", "-c", served.line("curl ")], check=True, capture_output=True, text=True)

        assert [served.chat()[0], served.chat(key="pk-wrong")[0], served.chat(key=key)[0]] == [401, 401, 200]
        assert json.loads(curl.stdout)["model"] == "promptai-tiny"

        port = served.url.rpartition(":")[2]
        before = keys.read_bytes()
        taken = promptai("serve", "--host", "0.0.0.0", "--port", port, cwd=tmp_path, PROMPTAI_KEYS=str(tmp_path / "k"))  # noqa: S104

    assert (taken.returncode, (tmp_path / "k").exists()) == (2, False)
    assert keys.read_bytes() == before
    assert key not in keys.read_text()
    assert keys.stat().st_mode & 0o777 == 0o600
    with serving("--simulate", "1", "--host", "0.0.0.0", cwd=tmp_path) as again:  # noqa: S104
        curl_again = again.line("curl ")
        assert again.chat(key=key)[0] == 200
        assert again.chat()[0] == 401
    assert not any("API key: " in line for line in again.printed)
    assert '-H "Authorization: Bearer $PROMPTAI_API_KEY"' in curl_again


def reload_settings(served: Served, config: Path, text: str) -> str:
    """Change the settings and return the line logged for the reload."""
    before = len(served.logged)
    config.write_text(text)
    served.process.send_signal(signal.SIGHUP)

    def logged() -> list[str]:
        return [line for line in served.logged[before:] if "settings " in line]

    wait_for(lambda: bool(logged()), what="the reload")
    return logged()[0]


def test_logs_settings_that_need_a_restart_until_they_are_reverted(tmp_path: Path) -> None:
    config = tmp_path / "promptai.toml"
    with serving("--simulate", "1", cwd=tmp_path) as served:
        for _ in range(2):
            logged = reload_settings(served, config, "[gateway]\nmemory_mib = 700\n")
            assert logged.endswith("settings reloaded; restart to apply gateway.memory_mib")
        logged = reload_settings(served, config, "[gateway]\nmemory_mib = 700\nstrategy = 'round-robin'\n")
        assert logged.endswith("; restart to apply gateway.strategy, gateway.memory_mib")
        # Engine settings stay open until the first model is served.
        logged = reload_settings(served, config, "[gateway]\ncache_ram_mib = 7\n[engine]\nslots = 2\n")
        assert logged.endswith("settings reloaded")
        assert reload_settings(served, config, "# as at the start\n").endswith("settings reloaded")


def test_an_emptied_settings_file_is_not_applied(tmp_path: Path) -> None:
    """The disk may be full, or an editor still writing; a file that was empty at the start may stay empty."""
    config = tmp_path / "promptai.toml"
    config.write_text("")
    with serving("--simulate", "1", cwd=tmp_path) as served:
        assert "settings reloaded" in reload_settings(served, config, "\n")
        assert "reloaded" in reload_settings(served, config, "[aliases.short]\nmodel = 'simulated-1.5b'\n")
        for text in ("", " \n"):
            logged = reload_settings(served, config, text)
            assert "settings not reloaded: settings promptai.toml is empty" in logged
            assert served.get("/v1/models/short")[0] == 200
        assert "settings reloaded" in reload_settings(served, config, "# none\n")
        assert served.get("/v1/models/short")[0] == 404


def test_prints_no_example_if_no_model_is_available(tmp_path: Path) -> None:
    (tmp_path / "promptai.toml").write_text("[gateway]\nmemory_mib = 500\ncache_ram_mib = 1024\n")
    with serving(*ONE_THREAD, cwd=tmp_path) as served:
        logged = served.line("no model is available yet: local/promptai-tiny: needs 1.0 GiB of memory")

    assert logged.endswith("use a smaller [gateway] cache_ram_mib (now 1024)")
    assert not any(line.startswith(("try it", "curl ")) for line in served.printed)


def test_the_printed_command_adds_keys_to_the_file_of_the_gateway(tmp_path: Path) -> None:
    config = tmp_path / "our gateway.toml"
    config.write_text(f"[gateway]\nkeys = '{tmp_path}/ours.json'\n")
    with serving("--simulate", "1", "--config", str(config), "--host", "0.0.0.0", cwd=tmp_path) as served:  # noqa: S104
        command = served.line("add more with: promptai ").removeprefix("add more with: promptai ")
        added = promptai(*shlex.split(command), cwd=tmp_path)
        key = added.stdout.strip()
        wait_for(lambda: served.chat(key=key)[0] == 200, what="the key", seconds=10)

    assert command == f"keys add NAME --config '{config}'"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ServeOptions(models=("named",), slots=8), (8, None, 900)),
        (ServeOptions(models=("named",), context=512), (1, 2, None)),
        (ServeOptions(models=("named",)), (1, 2, 900)),
    ],
    ids=["slots", "context", "neither"],
)
def test_the_command_line_overrides_the_settings_of_a_model(
    options: ServeOptions, expected: tuple[int, int | None, int | None]
) -> None:
    entries = (ServeEntry("named", slots=2, context=900), ServeEntry("other", slots=2, context=900))

    settings = _with_options(Settings(engine=EngineSettings(), serve=entries), options)

    assert settings.engine.slots == expected[0]
    assert settings.engine.context == options.context
    assert [(entry.model, entry.slots, entry.context) for entry in settings.serve] == [
        ("named", *expected[1:]),
        ("other", *expected[1:]),
    ]


def test_simulated_boards_need_no_model_and_no_engine(tmp_path: Path) -> None:
    with serving("--simulate", "4", cwd=tmp_path) as served:
        fleet = served.get("/api/fleet")[1]
        status, answer = served.chat(messages=QUESTION, max_tokens=3)

        assert [replica["id"] for replica in fleet["replicas"]] == ["pi5-1", "pi5-2", "pi5-3", "pi5-4"]
        assert {replica["model"] for replica in fleet["replicas"]} == {"simulated-1.5b"}
        assert (status, answer["model"]) == (200, "simulated-1.5b")
        assert children_of(served.process.pid, "promptai.engine") == []


def test_library_models_load_on_their_first_request(tmp_path: Path, small_model: Path) -> None:
    for name in ("first", "second"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.gguf").write_bytes(small_model.read_bytes())
    with serving(*ONE_THREAD, cwd=tmp_path, PROMPTAI_MODELS=str(tmp_path / "models")) as served:
        cold = served.states()
        status, answer = served.chat(model="second", max_tokens=2)
        after = served.states()

    assert cold == {"local/first": "cold", "local/second": "cold"}
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
    assert after == {"local/first": "cold", "local/second": "ready"}


def test_adding_a_model_drains_and_restarts_the_others(tmp_path: Path, small_model: Path) -> None:
    config = tmp_path / "promptai.toml"
    config.write_text("[[serve]]\nmodel = 'promptai-tiny'\npreload = true\n")
    with serving(*ONE_THREAD, cwd=tmp_path) as served:
        served.ready()
        answer = served.stream(model="promptai-tiny", max_tokens=2000, ignore_eos=True)
        answer.until_first_text()
        config.write_text(f"[[serve]]\nmodel = 'promptai-tiny'\n[[serve]]\nmodel = '{small_model}'\n")
        served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "draining" in served.states().values(), what="draining")
        meanwhile = served.chat(model="promptai-tiny")[0]

        assert answer.whole()
        assert answer.reason == "length"
        assert meanwhile == 200
        assert served.chat(model="small")[0] == 200
