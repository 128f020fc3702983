"""Events of a run besides requests: sessions, opened targets, and the cost of measuring.

One JSON line each in ``events.jsonl``. A harness that does not measure itself has to be trusted;
this one records the CPU and memory of its client and its telemetry for every session. Between two
sessions a board may get another kernel or governor, so each session records them.
"""

import msgspec


class Session(msgspec.Struct, frozen=True, tag="session", tag_field="event"):
    """
    A session of measuring began: the run started or was resumed.

    Attributes:
        t: Seconds on the run's clock.
        kernel, governor: Kernel and CPU governor of the client's machine, as in the manifest.
    """

    t: float
    kernel: str
    governor: str | None


class Opened(msgspec.Struct, frozen=True, tag="opened", tag_field="event"):
    """
    A target was opened and warmed up.

    Attributes:
        t: Seconds on the run's clock.
        load_s: Seconds until the engine was ready; ``None`` for a server that was already running.
        warm_up_s: Seconds of the first request, which pages the weights in.
        llama_server: Whether it is a llama-server, whose cache can be disabled; ``None`` in older runs, which did
            not record it.
    """

    t: float
    target: str
    load_s: float | None
    warm_up_s: float | None
    llama_server: bool | None = None


class MeasurementCost(msgspec.Struct, frozen=True, tag="cost", tag_field="event"):
    """
    Resources that one session of measuring used.

    Attributes:
        t: Seconds on the run's clock.
        wall_s: Seconds from each target's first to its last request, summed; loading and warm-up are left out because
            they would dilute the cost.
        client_cpu_s: CPU seconds of this process in that time, including the progress display.
        client_max_rss_bytes: Peak memory of this process.
        telemetry_cpu_s, telemetry_wall_s, telemetry_max_rss_bytes: The same for the sampler's process.
        energy_source: Source of the power readings; ``None``: not measured.
        telemetry_error: Why telemetry ended early; ``None``: it did not.
    """

    t: float
    wall_s: float
    client_cpu_s: float
    client_max_rss_bytes: int | None
    telemetry_cpu_s: float | None
    telemetry_wall_s: float | None
    telemetry_max_rss_bytes: int | None
    energy_source: str | None = None
    telemetry_error: str | None = None


Event = Session | Opened | MeasurementCost
