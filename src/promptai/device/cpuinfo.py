"""Say in llama.cpp's words what /proc/cpuinfo says in the kernel's.

Whether an engine was built for its processor decides a factor of two in
prefill, and an engine only tells in llama.cpp's names (``DOTPROD``,
``AVX512_VNNI``) while Linux only knows its own (``asimddp``, ``avx512_vnni``).
Both have to be put side by side to see an engine that wastes its board. On ARM
even the processor's name is missing: /proc/cpuinfo carries two hexadecimal
numbers, and "Cortex-A76" must be looked up.

Pure functions over the text. What is *absent* from the lists may still be in
the silicon: a hypervisor or a 32-bit kernel hides features, and what the kernel
hides an engine cannot use either.

Names: ``ggml_backend_cpu_get_features`` in llama.cpp; the kernel's ELF hwcaps
documentation for arm64; Arm's Main ID Register values for the core names.
"""

import os
import re

_Processor = dict[str, str]

#: llama.cpp's name → the kernel flags that must all be there, in llama.cpp's order.
_X86_FEATURES = {
    "SSE3": ("pni",),
    "SSSE3": ("ssse3",),
    "AVX": ("avx",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX2": ("avx2",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "BMI2": ("bmi2",),
    # An AVX-512 build of llama.cpp uses these five subsets, not the foundation alone.
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

#: (CPU implementer, CPU part) → what people call it.
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
    Give one mapping for each processor, keys as in the file.

    A block without a ``processor`` line (the board's revision and serial number
    on a Pi) belongs to no processor and is left out.
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
    List the features that *every* processor has, in llama.cpp's names and order.

    Every one, because a thread may be moved to any core: on a mixed chip an
    instruction of the big cores alone is a crash on the little ones.
    """
    if not processors:
        return ()
    flag_sets = [set(p.get("flags", p.get("Features", "")).split()) for p in processors]
    flags = set.intersection(*flag_sets)
    names = _X86_FEATURES if "flags" in processors[0] else _ARM_FEATURES
    return tuple(name for name, needed in names.items() if flags.issuperset(needed))


def architecture(processors: list[_Processor]) -> str:
    """Give the architecture as ``uname -m`` would: "x86_64", "aarch64", "armv7l"."""
    first = processors[0] if processors else {}
    if "flags" in first:
        # "lm", long mode, is the kernel's flag for a 64-bit processor.
        return "x86_64" if "lm" in first["flags"].split() else "i686"
    if "CPU implementer" in first:
        # Only a 64-bit kernel lists "asimd"; a 32-bit one calls the same unit "neon".
        return "aarch64" if "asimd" in first.get("Features", "").split() else "armv7l"
    return os.uname().machine


def model_name(processors: list[_Processor]) -> str:
    """
    Give what the processor is called: "AMD EPYC", "Cortex-A76", "Cortex-A55 + Cortex-A76".

    An ARM core that is not in the table is given by its numbers; a file that
    says nothing gives "unknown".
    """
    names = (_core_name(p) or " ".join(p.get("model name", "").split()) for p in processors)
    return " + ".join(dict.fromkeys(name for name in names if name)) or "unknown"


def _core_name(processor: _Processor) -> str | None:
    """Give an ARM core's name; ``None`` when this is no ARM core."""
    try:
        implementer = int(processor["CPU implementer"], 16)
        part = int(processor["CPU part"], 16)
    except (KeyError, ValueError):
        return None
    return _ARM_CORES.get((implementer, part), f"ARM core {implementer:#x}/{part:#x}")
