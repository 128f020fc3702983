"""The recipe of a build, and the record of a built engine.

A binary does not show from which source, with which flags and for which processor it was built, and that is the first
question when one board serves a model at half the speed of another. So each built engine has an ``engine.json``. An
engine counts as built only when that file and all of its programs exist.
"""

import re
from pathlib import Path

import msgspec

from promptai.engine import source
from promptai.wire.malformed import MALFORMED

#: The programs that are built; the first brings the libraries that the others share.
PROGRAMS = ("llama-server", "llama-bench", "llama-quantize", "llama-perplexity")


class BuildRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """
    A build to run.

    Attributes:
        version: Version of the source package; ignored with ``archive``.
        archive: A local file to build from; ``None``: fetch the source package.
        sha256: Expected SHA-256 of the archive; ``None``: the pinned one, and any for a local file without a pin.
        portable: Build for every processor of this architecture instead of this one.
        jobs: Number of parallel compilers.
        again: Build even when the engine exists already.
        keep: Keep the build tree.
    """

    version: str = source.PINNED
    archive: Path | None = None
    sha256: str | None = None
    portable: bool = False
    jobs: int = 1
    again: bool = False
    keep: bool = False

    @property
    def release(self) -> str:
        """Name of the source, for example ``llama-cpp-python-0.3.36``."""
        version = self.version if self.archive is None else source.release_of(self.archive)
        if version is not None:
            return f"llama-cpp-python-{version}"
        stem = re.sub(r"(\.tar)?\.\w+$", "", self.archive.name) if self.archive is not None else ""
        return re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "llama.cpp"

    @property
    def name(self) -> str:
        """Name of the engine and of its folder."""
        return f"{self.release}-{'portable' if self.portable else 'native'}"

    @property
    def expected_sha256(self) -> str | None:
        """Expected SHA-256 of the archive: the user's, else the pinned one; ``None``: unknown."""
        version = self.version if self.archive is None else source.release_of(self.archive)
        pinned = source.RELEASES.get(version) if version is not None else None
        return self.sha256 or (pinned.sha256 if pinned is not None else None)


class BuiltEngine(msgspec.Struct, frozen=True, kw_only=True):
    """
    ``engine.json``: the sources, flags and processor of a built engine.

    Attributes:
        archive_sha256: SHA-256 of the source archive.
        commit: Commit of llama.cpp; ``None``: not recorded in the archive.
        version, compiler: As the server reports them; ``None``: not reported.
        flags: Arguments of cmake.
        features: SIMD features that the engine uses, in llama.cpp's names; ``None``: not reported.
        cpu, cpu_features: The processor that it was built on.
        sha256: SHA-256 of each program.
    """

    name: str
    release: str
    archive_sha256: str
    commit: str | None
    version: str | None
    compiler: str | None
    flags: tuple[str, ...]
    features: tuple[str, ...] | None
    cpu: str
    cpu_features: tuple[str, ...]
    created: str
    sha256: dict[str, str]


def read_built(folder: Path) -> BuiltEngine | None:
    """Read ``engine.json`` of a finished engine; ``None`` when the engine is incomplete or the file damaged."""
    if not all((folder / "bin" / program).is_file() for program in PROGRAMS):
        return None
    try:
        return msgspec.json.decode((folder / "engine.json").read_bytes(), type=BuiltEngine)
    except OSError:
        return None
    except MALFORMED:
        return None
