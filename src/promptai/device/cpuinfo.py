"""Translate /proc/cpuinfo from the kernel's names to llama.cpp's.

An engine that was not built for its processor loses a factor of two in prefill.
Engines report features by llama.cpp's names (``DOTPROD``, ``AVX512_VNNI``), Linux by its
own (``asimddp``, ``avx512_vnni``); only a common list shows an engine that wastes its board. On ARM
/proc/cpuinfo lacks even the processor's name: it has two hexadecimal numbers, and
"Cortex-A76" must be looked up.

Pure functions over the text. A feature that is *absent* may still exist in the silicon:
hypervisors and 32-bit kernels hide features, but engines cannot use hidden ones either.

Names: ``ggml_backend_cpu_get_features`` in llama.cpp; the kernel's ELF hwcaps
documentation for arm64; Arm's Main ID Register values for the core names.
"""

import os
import re

_Processor = dict[str, str]

#: llama.cpp's name → the kernel flags that it requires, in llama.cpp's order.
_X86_FEATURES = {
    "SSE3": ("pni",),
    "SSSE3": ("ssse3",),
    "AVX": ("avx",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX2": ("avx2",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "BMI2": ("bmi2",),
    # llama.cpp's AVX-512 builds use these five subsets, not just the foundation.
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_INT8": ("amx_int8",),
}
_ARM_FEATURES = {
    "NEON": ("asimd",),
    "ARM_FMA": ("asimd",),  # part of every ARMv8 core
    "FP16_VA": ("asimdhp",),
    "MATMUL_INT8": ("i8mm",),
    "SVE": ("sve",),
    "DOTPROD": ("asimddp",),
    "SME": ("sme",),
}

#: (CPU implementer, CPU part) → name.
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0xC0, 0xAC3): "Ampere-1",
}


def parse_cpuinfo(text: str) -> list[_Processor]:
    """
    Parse one mapping per processor, with the file's keys.

    Skips blocks without a ``processor`` line: on a Pi, one has the board's revision and serial number.
    """
    processors: list[_Processor] = []
    for block in re.split(r"\n\s*\n", text):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if "processor" in fields:
            processors.append(fields)
    return processors


def simd_features(processors: list[_Processor]) -> tuple[str, ...]:
    """
    List the features that *all* processors have, in llama.cpp's names and order.

    All, because the kernel may move a thread to any core: on a mixed chip, an instruction that
    only the big cores have crashes on the little ones.
    """
    if not processors:
        return ()
    flag_sets = [set(p.get("flags", p.get("Features", "")).split()) for p in processors]
    flags = set.intersection(*flag_sets)
    names = _X86_FEATURES if "flags" in processors[0] else _ARM_FEATURES
    return tuple(name for name, needed in names.items() if flags.issuperset(needed))


def architecture(processors: list[_Processor]) -> str:
    """Return the architecture as in ``uname -m``: "x86_64", "aarch64", "armv7l"."""
    first = processors[0] if processors else {}
    if "flags" in first:
        # "lm" (long mode) is the kernel's flag for a 64-bit processor.
        return "x86_64" if "lm" in first["flags"].split() else "i686"
    if "CPU implementer" in first:
        # Only 64-bit kernels list "asimd"; 32-bit kernels call the same unit "neon".
        return "aarch64" if "asimd" in first.get("Features", "").split() else "armv7l"
    return os.uname().machine


def model_name(processors: list[_Processor]) -> str:
    """
    Return the processor's name: "AMD EPYC", "Cortex-A76", "Cortex-A55 + Cortex-A76".

    ARM cores missing from the table are named by their numbers; "unknown" when the file has no name.
    """
    names = (_core_name(p) or " ".join(p.get("model name", "").split()) for p in processors)
    return " + ".join(dict.fromkeys(name for name in names if name)) or "unknown"


def _core_name(processor: _Processor) -> str | None:
    """Return an ARM core's name; ``None`` for other processors."""
    try:
        implementer = int(processor["CPU implementer"], 16)
        part = int(processor["CPU part"], 16)
    except (KeyError, ValueError):
        return None
    return _ARM_CORES.get((implementer, part), f"ARM core {implementer:#x}/{part:#x}")
