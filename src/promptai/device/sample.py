"""One line of telemetry: the state of the machine and the engine at one moment.

A measurement is only credible together with the board's state: how busy its cores were,
whether the weights stayed in memory, how hot it was. Boards differ in what they report.
A field that a board does not report is ``None`` (``null`` in the file), never 0: an
average over invented zeros would make a hot board look cool.

``recording`` writes samples, ``telemetry.read_samples`` reads them and ignores unknown
fields of later versions.
"""

import msgspec


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """
    The state of machine and engine at ``t``; rates are means since the previous sample.

    The engine is the watched process with all its descendants. Its fields are ``None`` while
    no process is watched and after the watched process has ended; its memory fields also while
    the kernel does not report them for every member.

    Attributes:
        t: Seconds since the recording's origin on CLOCK_MONOTONIC (``time.monotonic()`` on Linux), by default
            the clock's own 0. All processes share the clock until the machine restarts.
        cpu_percent: Busy share of *all* usable cores, 0-100, by any process. As in top, steal counts as busy,
            idle and iowait do not. ``None`` in the first sample.
        engine_cpu_percent: The engine's share of all usable cores, 0-100: all of four cores are 100, not 400.
            Counted in ticks of 10 ms, so a sample of 1 s on 4 cores is accurate to half a percent.
        engine_anon_bytes: The engine's anonymous memory in RAM: KV cache, buffers.
        engine_file_bytes: The engine's mapped files in RAM: the weights, page cache that the kernel may drop.
        engine_rss_bytes: Sum of anonymous, file-backed and shared memory; other tools call it RSS.
        available_bytes: Memory available without swapping (``MemAvailable``).
        swap_used_bytes: Swap in use, zram included; ``None`` on machines without swap.
        major_faults: Page faults of the engine that read the disk, cumulative: compare samples.
        load1: The kernel's one-minute load average, in runnable or disk-bound tasks.
        temperature_c: Processor temperature in degrees Celsius.
        cpu_mhz: Mean clock of the usable CPUs in MHz, as set by the kernel; a Pi's firmware may run slower,
            which only ``throttled`` shows. ``None`` without cpufreq (most virtual machines).
        throttled: A Raspberry Pi's flags, bits as in ``device.firmware``; bits 16-19 mean "since boot".
        watts: Current power; ``TelemetryCost.energy_source`` names the source.
        memory_pressure: Share of the last 10 s in which some task waited for memory, 0-100 (PSI "some avg10",
            machine-wide). ``None`` where PSI is off: Raspberry Pi OS needs ``psi=1`` in cmdline.txt.
        own_cpu_percent_of_one_core: The sampler's own CPU use since the previous sample, ``vcgencmd`` included.
        own_rss_bytes: The sampler's own memory.
    """

    t: float
    cpu_percent: float | None = None
    engine_cpu_percent: float | None = None
    engine_anon_bytes: int | None = None
    engine_file_bytes: int | None = None
    engine_rss_bytes: int | None = None
    available_bytes: int | None = None
    swap_used_bytes: int | None = None
    major_faults: int | None = None
    load1: float | None = None
    temperature_c: float | None = None
    cpu_mhz: float | None = None
    throttled: int | None = None
    watts: float | None = None
    memory_pressure: float | None = None
    own_cpu_percent_of_one_core: float | None = None
    own_rss_bytes: int | None = None


class SamplerCost(msgspec.Struct, frozen=True, kw_only=True):
    """
    The cost of sampling, which the sampler reports when it ends.

    Counted from the first sample: the interpreter starts before the measurement does.

    Attributes:
        samples: Number of lines written.
        cpu_s: CPU seconds of the sampler and of the commands it ran.
        wall_s: Seconds from the first sample to the end.
        cpu_percent_of_one_core: 100 · cpu_s / wall_s.
        max_rss_bytes: Peak memory, startup included; ``None`` when the kernel does not report it.
        energy_source: Source of ``Sample.watts``: a name of ``device.energy``, "none" without a source.
    """

    samples: int
    cpu_s: float
    wall_s: float
    cpu_percent_of_one_core: float
    max_rss_bytes: int | None
    energy_source: str


class Command(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """
    One line on the sampler's standard input.

    Attributes:
        watch: PID to watch from now on, ``None`` for no process; unset means no change.
        stop: Stop sampling.
    """

    watch: int | msgspec.UnsetType | None = msgspec.UNSET
    stop: bool = False
