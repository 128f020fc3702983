import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from promptai.bench.arrivals import Arrivals
from promptai.bench.manifest import TargetFacts
from promptai.bench.plan import Protocol
from promptai.bench.summary import RecordedRun, summarize
from promptai.errors import RunError
from promptai.report import html
from promptai.report.figures import draw, javascript
from promptai.report.html import render, write_report
from promptai.report.rows import ROWS
from support_runs import ENGINE, FACTS, MODEL, make_failure, make_run

ATTACK = "</script><script>alert(1)"
RUN = make_run()


class Page(HTMLParser):
    """
    A page as parsed by a browser.

    Attributes:
        tags: Every start tag with its attributes.
        text: The text between the tags.
        styles, scripts: The contents of these elements.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.styles = "", ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record a start tag."""
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        """Record an end tag."""
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        """Record text by element."""
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles += data
        else:
            self.text += data

    @property
    def findings(self) -> list[str | None]:
        """The class of each finding."""
        return [attributes.get("class") for tag, attributes in self.tags if tag == "li"]

    @property
    def specs(self) -> list[dict[str, Any]]:
        """The charts that the last script draws."""
        found: list[dict[str, Any]] = json.loads(re.findall(r"const specs = (.*);\n", self.scripts[-1])[0])
        return found

    def external(self) -> list[str]:
        """Every URL that opening the page would fetch."""
        linked = [
            value or ""
            for _, attributes in self.tags
            for name, value in attributes.items()
            if name in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
        ]
        inline = [value or "" for _, attributes in self.tags if (value := attributes.get("style"))]
        styled = re.findall(r"@import[^;]*|url\([^)]*\)", "".join([self.styles, *inline]))
        return [reference for reference in (*linked, *styled) if not reference.startswith(("#", "data:"))]


def hostile(run: RecordedRun) -> RecordedRun:
    """The same run, in which every external string attacks the page."""
    model = replace(MODEL, name=ATTACK, architecture=ATTACK, quantization=ATTACK)
    engine = replace(ENGINE, build=ATTACK, source=ATTACK)
    manifest = replace(
        run.manifest,
        targets=(replace(FACTS, name=ATTACK, model=model, engine=engine), replace(FACTS, name="x", url=ATTACK)),
        machine=replace(run.manifest.machine, board=ATTACK, kernel=ATTACK),
        workload=replace(run.manifest.workload, name=ATTACK, selected={ATTACK: 5}),
        command=("promptai", "bench", ATTACK),
    )
    traces = [replace(trace, target=ATTACK, conversation=f"{ATTACK}{trace.conversation}") for trace in run.traces]
    failed = replace(traces[-1], turn=99, error=f"{ATTACK}: oops")
    return replace(run, directory=ATTACK, manifest=manifest, traces=[*traces, failed])


def page_of(run: RecordedRun) -> str:
    summary = summarize(run)
    return render(run, summary, draw(run, summary))


@pytest.fixture(autouse=True, scope="module")
def short_bundle() -> Iterator[None]:
    """The real bundle takes seconds to build; one test below covers it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "javascript", lambda: "/* vega */")
        yield


@pytest.fixture(scope="module")
def page() -> Page:
    """The page of a complete run."""
    return Page(page_of(RUN))


@pytest.fixture(scope="module")
def attacked() -> str:
    """The source of a page whose external strings are all hostile."""
    return page_of(hostile(RUN))


def test_raises_run_error_if_the_page_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write to"):
        write_report(tmp_path / "absent", RUN, summarize(RUN))


def test_a_hostile_name_starts_no_script(attacked: str) -> None:
    """Names of models come from untrusted files."""
    attacked_page = Page(attacked)

    assert "<script>alert" not in attacked
    assert len(attacked_page.scripts) == 2
    assert ATTACK in attacked_page.text


def test_a_hostile_name_is_plain_data_in_charts(attacked: str) -> None:
    """It is escaped in the script, and intact once the script reads it."""
    (rows,) = Page(attacked).specs[0]["datasets"].values()

    assert {row["target"] for row in rows} == {ATTACK}


def test_a_hostile_bundle_cannot_close_its_own_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "javascript", lambda: 'x = "</script><img src=x>"')

    assert "img" not in {tag for tag, _ in Page(page_of(RUN)).tags}


def test_the_page_fetches_nothing(page: Page) -> None:
    assert page.external() == []


def test_the_content_security_policy_forbids_fetching(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]

    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_each_figure_has_its_place_and_its_data(page: Page) -> None:
    figures = draw(RUN, summarize(RUN))
    places = [attributes["id"] for tag, attributes in page.tags if tag == "div" and "id" in attributes]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section" and "id" in attributes]

    assert [f"chart-{number}" for number in range(1, 9)] == places
    assert [figure.name for figure in figures] == sections
    assert [figure.spec for figure in figures] == page.specs


def test_the_page_contains_every_metric_with_its_name(page: Page) -> None:
    part = summarize(RUN).targets[0].cold
    assert part is not None

    assert [name for name in ROWS if name not in page.text] == []
    assert "cold, n = 30" in page.text
    assert "10.0 tokens/s (10.0 to 10.0)" in page.text


def test_the_page_contains_the_facts_of_the_manifest(page: Page) -> None:
    needed = [MODEL.sha256, RUN.manifest.workload.sha256, "b1 (abc)", "performance", "Cortex-A76", "greedy", "pmic"]

    assert [words for words in needed if words not in page.text] == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"concurrency": 4}, "closed loop, concurrent conversations: 4"),
        ({"arrivals": Arrivals("poisson", 0.25)}, "poisson arrivals at 0.25 conversations per second"),
    ],
    ids=["closed", "open"],
)
def test_the_page_shows_the_arrivals(asked: dict[str, Any], words: str) -> None:
    run = replace(RUN, manifest=replace(RUN.manifest, protocol=Protocol(**asked)))

    assert words in page_of(run)


def test_the_command_can_be_pasted(page: Page) -> None:
    spaced = replace(RUN, manifest=replace(RUN.manifest, command=("promptai", "bench", "my model.gguf")))

    assert "promptai bench m.gguf" in page.text
    assert "promptai bench 'my model.gguf'" in Page(page_of(spaced)).text


def test_a_run_without_telemetry_has_a_page() -> None:
    page = Page(page_of(make_run(with_telemetry=False)))

    assert len(page.specs) == 5
    assert "decode_tps" in page.text
    assert "temperature_c_max" not in page.text


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        pytest.param((FACTS,), "m on Raspberry Pi 5", id="here"),
        pytest.param((TargetFacts("m", url="http://pi:80"),), "m, measured from Raspberry Pi 5", id="elsewhere"),
        pytest.param((TargetFacts("m", url="http://pi:80"),), "server at http://pi:80", id="server"),
        pytest.param((FACTS, replace(FACTS, name="second")), "second SHA-256", id="never-reached"),
    ],
)
def test_the_page_shows_where_each_target_ran(targets: tuple[TargetFacts, ...], words: str) -> None:
    assert words in Page(page_of(replace(RUN, manifest=replace(RUN.manifest, targets=targets)))).text


def test_the_page_distinguishes_warnings_from_notes(page: Page) -> None:
    facts = replace(FACTS, model=replace(MODEL, synthetic=True))
    manifest = replace(RUN.manifest, targets=(facts,))
    doubted = Page(page_of(replace(RUN, manifest=manifest, traces=[*RUN.traces[:-1], make_failure(repeat=1)])))

    assert page.findings == []
    assert doubted.findings == [None, "note"]
    assert ("incomplete" in page.text, "incomplete" in doubted.text) == (False, True)


@pytest.mark.real
def test_the_real_page_is_complete_and_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real JavaScript, which takes seconds to build."""
    monkeypatch.setattr(html, "javascript", javascript)
    path = write_report(tmp_path, RUN, summarize(RUN))
    page = Page(path.read_text(encoding="utf-8"))

    assert tmp_path / "report.html" == path
    assert page.external() == []
    assert len(page.scripts) == 2
    assert "vegaEmbed" in page.scripts[0]
