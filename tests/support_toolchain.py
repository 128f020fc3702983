"""A stand-in for llama.cpp and for what compiles it: an archive of a few files, and a cmake that is a shell script."""

import io
import os
import tarfile
from pathlib import Path

from promptai.engine.build_recipe import PROGRAMS

COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
VERSION = "9.9.9"
TOP = f"llama_cpp_python-{VERSION}"
FILES = {
    f"{TOP}/pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "scikit_build_core.build"\n',
    f"{TOP}/PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {VERSION}\n",
    f"{TOP}/.git/modules/vendor/llama.cpp/HEAD": f"{COMMIT}\n",
    f"{TOP}/vendor/llama.cpp/CMakeLists.txt": "project(stand-in)\n",
    f"{TOP}/vendor/llama.cpp/LICENSE": "MIT\n",
    f"{TOP}/vendor/llama.cpp/convert_hf_to_gguf.py": "import conversion\n",
    f"{TOP}/vendor/llama.cpp/conversion/__init__.py": "",
    f"{TOP}/vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    f"{TOP}/vendor/llama.cpp/tools/server/CMakeLists.txt": "",
    f"{TOP}/vendor/llama.cpp/models/large.gguf": "not needed",
}
OBJECTS = 8
#: The engine that comes of it.
NAME = f"llama-cpp-python-{VERSION}-native"

#: The built program: prints its build and features like llama-server, and exits because there is no model.
_PROGRAM = r"""#!/bin/sh
case "$1" in
--version) echo "version: 9.9-dev (build 0, commit 0c1e570)"; echo "built with GNU 12.2.0 for Linux";;
--help) echo "--fit [on|off]  adjust arguments";;
*) echo "build 0 (0c1e570) with GNU 12.2.0"; echo "system_info: CPU : SSE3 = 1 | LLAMAFILE = 1 |"; exit 1;;
esac
"""

_CMAKE = r"""#!/bin/sh
say() { echo "$@" >> "$STANDIN_RECORD"; }
case "$1" in
--version) echo "cmake version ${STANDIN_CMAKE:-3.25.1}";;
-S)
    test -f "$2/CMakeLists.txt" || { echo "CMake Error: there is no CMakeLists.txt"; exit 1; }
    mkdir -p "$4/objects" "$4/bin"
    say "configure $*"
    echo "-- Configuring done";;
--build)
    for number in $(seq @OBJECTS@); do
        object="$2/objects/$number.o"
        test -e "$object" && continue
        say "object $number"
        echo "[ ${number}0%] Building CXX object $number.o"
        if [ "$STANDIN_FAIL_AT" = "$number" ]; then
            echo "x.cpp:3:1: ${STANDIN_ERROR:-error: expected a semicolon}"; exit 2
        fi
        echo part > "$object"
        while [ "$STANDIN_STOP_AT" = "$number" ]; do
            echo "[ ${number}0%] still at $number"; touch "$STANDIN_RECORD.stopped"; sleep 0.05
        done
        touch -d "10 minutes ago" "$object"
    done
    for program in @PROGRAMS@; do
        cp "$(dirname "$0")/program" "$2/bin/$program"; chmod +x "$2/bin/$program"
        echo "[100%] Built target $program"
    done;;
esac
"""


class Watched:
    """A ``BuildProgress`` that records its calls."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.shares: list[float] = []

    def step(self, text: str) -> None:
        """Record a step."""
        self.steps.append(text)

    def share(self, share: float, detail: str) -> None:
        """Record the share."""
        del detail
        self.shares.append(share)

    def tick(self) -> None:
        """Record a tick."""


def write_archive(path: Path, files: dict[str, str] = FILES) -> Path:
    """Write a source package with the few files that the steps read."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def write_toolchain(folder: Path, program: str = _PROGRAM) -> dict[str, str]:
    """
    Write a cmake, a make and a compiler that compile nothing, and return an environment with them first on PATH.

    With ``STANDIN_FAIL_AT`` an object fails, with ``STANDIN_STOP_AT`` one never ends.
    """
    folder.mkdir(parents=True)
    cmake = _CMAKE.replace("@OBJECTS@", str(OBJECTS)).replace("@PROGRAMS@", " ".join(PROGRAMS))
    for name, text in {"cmake": cmake, "make": "#!/bin/sh\n", "g++": "#!/bin/sh\n", "program": program}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STANDIN_RECORD": str(folder / "record"),
        "STANDIN_FAIL_AT": "",
        "STANDIN_STOP_AT": "",
    }


def record(environ: dict[str, str]) -> list[str]:
    """Return the calls of cmake: ``configure …`` and ``object N``."""
    path = Path(environ["STANDIN_RECORD"])
    return path.read_text().splitlines() if path.exists() else []


def objects(environ: dict[str, str]) -> list[int]:
    """Return the numbers of the compiled objects, in order."""
    return [int(line.split()[1]) for line in record(environ) if line.startswith("object")]
