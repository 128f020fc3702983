"""What happened in a run besides requests: sessions, engines that were loaded, and what the measuring itself cost.

One JSON line each in ``events.jsonl``. A harness that does not account for itself
asks to be believed; this one writes down how much of a core and of memory its
client and its telemetry took, for every session of the run. Between two sessions
a board may get another kernel or governor; that is written down too.
"""

import msgspec


class Session(msgspec.Struct, frozen=True, tag="session", tag_field="event"):
    """
    Measuring began, or went on.

    Attributes:
        t: On the run's clock.
        kernel, governor: Of the client's machine, as in the manifest.
    """

    t: float
    kernel: str
    governor: str | None


class Opened(msgspec.Struct, frozen=True, tag="opened", tag_field="event"):
    """
    A target was opened and warmed up.

    Attributes:
        t: On the run's clock.
        load_s: Seconds until it could answer; ``None`` for a server that was already there.
        warm_up_s: Seconds of the first request, which pages the weights in.
        llama_server: Whether it speaks llama-server's dialect, in which a cache can be switched off; ``None`` in
            runs that did not write it down.
    """

    t: float
    target: str
    load_s: float | None
    warm_up_s: float | None
    llama_server: bool | None = None


class MeasurementCost(msgspec.Struct, frozen=True, tag="cost", tag_field="event"):
    """
    What one session of measuring took.

    Attributes:
        wall_s: Seconds of playing, from each target's first to its last request: loading and warming up would
            thin the cost out.
        client_cpu_s: CPU seconds of this process in those, progress display included.
        client_max_rss_bytes: The most memory this process held.
        telemetry_cpu_s, telemetry_max_rss_bytes: The same of the sampler's process.
        energy_source: Where watts came from; ``None`` when nothing measured them.
        telemetry_error: Why telemetry ended early; ``None`` when it did not.
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
