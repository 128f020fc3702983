from promptai.device.cpuinfo import architecture, model_name, parse_cpuinfo, simd_features


def test_an_empty_file_has_no_processors_and_no_name() -> None:
    """No processors, no features, no invented name."""
    assert parse_cpuinfo("") == []
    assert simd_features([]) == ()
    assert model_name([]) == "unknown"


def test_a_core_without_its_part_number_has_no_name() -> None:
    """The lookup needs both numbers."""
    assert model_name([{"processor": "0", "CPU implementer": "0x41"}]) == "unknown"


def test_an_unknown_core_is_named_by_its_numbers() -> None:
    """A core newer than the table must remain distinguishable from others."""
    assert model_name([{"CPU implementer": "0x41", "CPU part": "0xfff"}]) == "ARM core 0x41/0xfff"


def test_the_board_s_own_block_is_not_a_processor() -> None:
    """A Pi ends the file with its revision and serial number."""
    text = "processor : 0\nFeatures : asimd\n\nRevision : c04170\nModel : Raspberry Pi 5\n"

    assert parse_cpuinfo(text) == [{"processor": "0", "Features": "asimd"}]


def test_the_avx512_foundation_alone_is_not_avx512() -> None:
    """llama.cpp's AVX-512 code needs five subsets; a Xeon Phi has one."""
    names = simd_features([{"processor": "0", "flags": "lm avx avx2 avx512f"}])

    assert "AVX512" not in names
    assert names == ("AVX", "AVX2")


def test_only_features_of_all_cores_count() -> None:
    """The kernel may move a thread to a core that lacks the instruction."""
    big = {"processor": "4", "Features": "asimd asimddp i8mm"}
    little = {"processor": "0", "Features": "asimd asimddp"}

    assert simd_features([little, big]) == ("NEON", "ARM_FMA", "DOTPROD")


def test_two_kinds_of_core_are_both_named() -> None:
    """Each kind is named once, regardless of the number of its cores."""
    little = {"CPU implementer": "0x41", "CPU part": "0xd05"}
    big = {"CPU implementer": "0x41", "CPU part": "0xd0b"}

    assert model_name([little, little, big, big]) == "Cortex-A55 + Cortex-A76"


def test_a_server_s_features_come_in_llama_cpp_s_names() -> None:
    """Every name that an engine may report on x86, in its order."""
    flags = (
        "lm pni ssse3 avx avx_vnni avx2 f16c fma bmi2 avx512f avx512cd avx512vl avx512dq avx512bw"
        " avx512vbmi avx512_vnni avx512_bf16 amx_int8"
    )

    assert " ".join(simd_features([{"processor": "0", "flags": flags}])) == (
        "SSE3 SSSE3 AVX AVX_VNNI AVX2 F16C FMA BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 AMX_INT8"
    )


def test_the_architecture_is_determined_by_the_file_alone() -> None:
    """It does not depend on the machine that runs the test."""
    assert architecture([{"flags": "lm"}]) == "x86_64"
    assert architecture([{"flags": "fpu"}]) == "i686"
    assert architecture([{"CPU implementer": "0x41", "Features": "fp asimd"}]) == "aarch64"
    assert architecture([{"CPU implementer": "0x41", "Features": "neon vfpv4"}]) == "armv7l"
