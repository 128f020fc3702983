import pytest
from msgspec.structs import replace

from promptai.bench.manifest import MachineFacts, verify_same_machine
from promptai.errors import RunError
from support_runs import MACHINE


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(MACHINE, board="OptiPlex 7090"), "on Raspberry Pi 5 Model B Rev 1.0, this is OptiPlex 7090"),
        (replace(MACHINE, cpu=replace(MACHINE.cpu, model_name="Cortex-A72")), "on Cortex-A76, this is Cortex-A72"),
    ],
    ids=["other-board", "other-processor"],
)
def test_refuses_to_resume_on_another_machine(now: MachineFacts, words: str) -> None:
    """Half of its figures would be from another board, under the name of the first."""
    with pytest.raises(RunError, match=words) as error:
        verify_same_machine(MACHINE, now)

    assert "start a new run" in error.value.hint


def test_resumes_with_another_kernel_governor_or_python() -> None:
    """The session records the difference, and a warning reports it."""
    cpu = replace(MACHINE.cpu, governor="ondemand")
    verify_same_machine(MACHINE, replace(MACHINE, kernel="Linux 6.12", python="3.13.1", cpu=cpu))
