"""The options of a run, typed, with the defaults of the paper's protocol.

The command line and the settings become one ``BenchOptions``; ``bench.prepare`` reads nothing else.
"""

from pathlib import Path

import msgspec

from promptai.bench.arrivals import Arrivals
from promptai.bench.plan import Protocol
from promptai.bench.trace import Cache
from promptai.bench.workload import EDGE_50, History
from promptai.engine.client import SILENCE_S
from promptai.errors import SettingsError


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """
    What to measure and how; fields of ``Protocol`` have the same meaning here.

    Attributes:
        library: Directory of downloaded models.
        engines: Directory of engines built on this machine.
        targets: GGUF files, names of downloaded models or URLs of servers; empty: the bundled model.
        workload: ``edge-50``, ``oasst1``, ``oasst1:FILE`` or the path of a .jsonl file.
        conversations: Number to select, evenly by length; ``None``: all.
        budget_s: Time limit that the workload is cut to; ``None``: unlimited.
        engine_path: A llama-server to use; ``None``: the best one found.
        threads: ``None``: the physical cores available to this process.
        context: Tokens of context of one slot; ``None``: enough for the workload.
        slots: Slots of each engine.
        port: Port of the engine; 0: a free one.
        silence_s: Longest wait for the next bytes of an answer.
        runs: Directory in which the run's directory is created.
        api_key: For servers that require one; never written to the run.
        command: Command line for the manifest.
    """

    library: Path
    engines: Path
    targets: tuple[str, ...] = ()
    workload: str = EDGE_50
    conversations: int | None = None
    budget_s: float | None = None
    caches: tuple[Cache, ...] = ("cold", "warm")
    history: History = "data"
    max_tokens: int = 500
    repeats: int = 1
    concurrency: int = 1
    arrivals: Arrivals = Arrivals()
    ignore_eos: bool = False
    seed: int = 0
    engine_path: Path | None = None
    threads: int | None = None
    context: int | None = None
    slots: int = 1
    batch: int = 512
    cache_type: str = "f16"
    cache_ram_mib: int = 0
    mmap: bool = True
    port: int = 0
    silence_s: float = SILENCE_S
    runs: Path = Path("runs")
    api_key: str | None = None
    command: tuple[str, ...] = ()

    def protocol(self) -> Protocol:
        """
        Return the part that defines the requests.

        Raises:
            SettingsError: A number is out of range, or two options contradict each other.
        """
        if self.max_tokens < 1 or self.repeats < 1:
            raise SettingsError("--max-tokens and --repeats must be at least 1")
        if not self.silence_s > 0:  # NaN is not above 0 either
            raise SettingsError(f"--timeout must be above 0 seconds, not {self.silence_s:g}")
        if self.concurrency > 1 and self.arrivals.kind != "closed":
            raise SettingsError(
                f"--concurrency {self.concurrency} cannot be combined with --arrivals {self.arrivals}",
                hint="open arrivals start conversations at their own times; drop one of the two options",
            )
        return Protocol(
            max_tokens=self.max_tokens,
            seed=self.seed,
            caches=self.caches,
            history=self.history,
            repeats=self.repeats,
            concurrency=self.concurrency,
            arrivals=self.arrivals,
            ignore_eos=self.ignore_eos,
        )
