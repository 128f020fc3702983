"""One line of telemetry: what the machine and the engine did in one moment.

A measurement is only believed with the board's state beside it: which cores were
busy, whether the weights stayed in memory, how hot it was. Boards differ in what
they can tell. A field that a board does not have is ``None`` (``null`` in the
file), never 0: an average over invented zeros would call a hot board cool.

Written by ``recording``, read through ``telemetry.read_samples``. Unknown fields
of a later version are ignored on reading.
"""

import msgspec


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """
    The state of machine and engine at ``t``; rates are means since the sample before.

    The engine is the watched process with all its descendants; its fields are
    ``None`` while nothing is watched or once the watched process has ended, those of
    its memory also while the kernel does not tell them of every member.

    Attributes:
        t: Seconds since the recording's origin on CLOCK_MONOTONIC (``time.monotonic()`` on Linux), by default
            the clock's own 0. The clock is shared by all processes, until the machine is started again.
        cpu_percent: Busy share of *all* usable cores, 0-100, whoever used them. Idle and iowait are not busy,
            steal is (as in top). ``None`` in the first sample.
        engine_cpu_percent: The engine's share of all usable cores, 0-100; all of four cores are 100, not 400.
            Counted in ticks of 10 ms, so a sample of 1 s on 4 cores is right to half a percent.
        engine_anon_bytes: The engine's anonymous memory in RAM: KV cache, buffers.
        engine_file_bytes: The engine's mapped files in RAM: the weights, page cache that the kernel may drop.
        engine_rss_bytes: Anonymous, file-backed and shared memory together; what other tools call RSS.
        available_bytes: What the machine could still give without swapping (``MemAvailable``).
        swap_used_bytes: Swap in use, zram included; ``None`` on a machine without swap.
        major_faults: Page faults of the engine that read a disk, since it began; look at differences.
        load1: The kernel's one-minute load average, in runnable or disk-bound tasks.
        temperature_c: The processor's temperature in degrees Celsius.
        cpu_mhz: Mean clock of the usable CPUs in MHz, as the kernel set it; a Pi's firmware may run slower,
            which shows in ``throttled`` alone. ``None`` without cpufreq (most virtual machines).
        throttled: A Raspberry Pi's flags, bits as in ``device.firmware``; bits 16-19 mean "since boot".
        watts: Power now; by which source, ``TelemetryCost.energy_source`` says.
        memory_pressure: Share of the last 10 s in which some task waited for memory, 0-100 (PSI "some avg10",
            machine-wide). ``None`` where PSI is off: Raspberry Pi OS needs ``psi=1`` in cmdline.txt.
        own_cpu_percent_of_one_core: The sampler's own cost since the sample before, ``vcgencmd`` included.
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
    What sampling cost, from the sampler's own mouth when it ends.

    Counted from the first sample: starting an interpreter happens before the
    measurement does.

    Attributes:
        samples: Lines written.
        cpu_s: CPU seconds of the sampler and of the commands it ran.
        wall_s: Seconds from the first sample to the end.
        cpu_percent_of_one_core: 100 · cpu_s / wall_s.
        max_rss_bytes: The most memory it held, start included.
        energy_source: Where ``Sample.watts`` came from: a name of ``device.energy``, "none" without any.
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
        watch: The process to watch from now on, ``None`` for none; unset leaves it as it is.
        stop: Finish.
    """

    watch: int | msgspec.UnsetType | None = msgspec.UNSET
    stop: bool = False
