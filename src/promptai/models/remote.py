"""Read the GGUF header of a remote file with range requests, without downloading the model.

The first megabytes of a file show whether the model fits a board; downloading
gigabytes to learn that it does not costs an evening. So bytes are requested as the
header is parsed. Most of a header is vocabulary (up to 20 MB), which must be read to
reach what follows, but long arrays of numbers are skipped without requesting them.
The first range is small because the most useful keys come first; later ranges grow
because each request costs a round trip.

This module does not know about hubs: ``fetch`` may be any function that returns a range
of a file. It stores nothing on disk. The limits of a header (``models.ggufbytes``)
bound the number of bytes requested.
"""

from collections.abc import Callable

from promptai.models.gguf import GgufHeader, parse_header

#: Offset and length -> these bytes, fewer only at the end of the file.
Fetch = Callable[[int, int], bytes]

_FIRST_BYTES = 256 * 1024
_LARGEST_BYTES = 4 * 1024 * 1024


def read_remote_header(
    fetch: Fetch, file_bytes: int, where: str, *, progress: Callable[[int], None] | None = None
) -> GgufHeader:
    """
    Read a GGUF header through ``fetch``, and check that the file is large enough for all tensors.

    Args:
        file_bytes: Size of the whole file, as reported by its server.
        where: The file's address, for the header and for messages.
        progress: Called with the number of bytes of each range received.

    Raises:
        ModelFormatError: The file is empty, not a GGUF, damaged or truncated.
        PromptAIError: Any error raised by ``fetch``.
    """
    return parse_header(_Window(fetch, file_bytes, progress), file_bytes, where)


class _Window:
    """A remote file read forwards, with read-ahead."""

    def __init__(self, fetch: Fetch, file_bytes: int, progress: Callable[[int], None] | None) -> None:
        self._fetch = fetch
        self._file_bytes = file_bytes
        self._progress = progress
        self._position = 0  # offset of the first byte in ``_buffer``
        self._buffer = b""
        self._read_ahead = _FIRST_BYTES

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes, fewer only if the file ends or the server sends too little."""
        missing = size - len(self._buffer)
        if missing > 0:
            start = self._position + len(self._buffer)
            length = min(max(missing, self._read_ahead), self._file_bytes - start)
            if length > 0:
                received = self._fetch(start, length)[:length]
                self._buffer += received
                if self._progress is not None:
                    self._progress(len(received))
            self._read_ahead = min(2 * self._read_ahead, _LARGEST_BYTES)
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        self._position += len(data)
        return data

    def seek(self, offset: int, _whence: int, /) -> int:
        """Skip ``offset`` bytes without requesting those not yet received."""
        self._buffer = self._buffer[offset:]
        self._position += offset
        return self._position
