"""What is to be built, and what was: the words in which both are written down.

An engine that was built last winter is a file without a memory: from which source, with
which flags, for which processor? A model that the board next door serves at half the
speed is a question for that memory. So each built engine has an ``engine.json``, and it
counts as built only when that is there beside all of its programs.
"""

import re
from pathlib import Path

import msgspec

from promptai.engine import source
from promptai.wire.malformed import MALFORMED

#: What is built, the first one with the libraries that the others share.
PROGRAMS = ("llama-server", "llama-bench", "llama-quantize", "llama-perplexity")


class BuildRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """
    What is to be built.

    Attributes:
        version: Of the source package; ignored with ``archive``.
        archive: A file to build from instead of fetching one.
        sha256: What the archive must be; absent: as pinned, or whatever the user's own file is.
        portable: For any processor of this kind instead of this one.
        jobs: Compilers at once.
        again: Build also what is there already.
        keep: Leave the build tree.
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
        """The source by name: ``llama-cpp-python-0.3.36``."""
        version = self.version if self.archive is None else source.release_of(self.archive)
        if version is not None:
            return f"llama-cpp-python-{version}"
        stem = re.sub(r"(\.tar)?\.\w+$", "", self.archive.name) if self.archive is not None else ""
        return re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "llama.cpp"

    @property
    def name(self) -> str:
        """The engine's name, and its folder's."""
        return f"{self.release}-{'portable' if self.portable else 'native'}"

    @property
    def expected_sha256(self) -> str | None:
        """What the archive must be: the user's word, else ours."""
        version = self.version if self.archive is None else source.release_of(self.archive)
        pinned = source.RELEASES.get(version) if version is not None else None
        return self.sha256 or (pinned.sha256 if pinned is not None else None)


class BuiltEngine(msgspec.Struct, frozen=True, kw_only=True):
    """
    ``engine.json``: what an engine was made of and for.

    Attributes:
        archive_sha256: Of the source.
        commit: Of llama.cpp; ``None`` when the archive did not tell.
        version, compiler: The server's own words.
        flags: Given to cmake.
        features: SIMD features that it uses, in llama.cpp's names; ``None`` when it does not say.
        cpu, cpu_features: The processor that it was built on.
        sha256: Of each program.
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
    """What ``engine.json`` says of a finished engine; ``None`` when it is not finished."""
    if not all((folder / "bin" / program).is_file() for program in PROGRAMS):
        return None
    try:
        return msgspec.json.decode((folder / "engine.json").read_bytes(), type=BuiltEngine)
    except OSError:
        return None
    except MALFORMED:
        return None
