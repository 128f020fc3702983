"""Read the header of a model that lies elsewhere, a few pieces of it, without fetching the model.

Whether a file fits a board stands in its first megabytes; fetching gigabytes to
learn that it does not is an evening lost. So the bytes are fetched as the header
is read. Most of a header is vocabulary (up to 20 MB), which has to be walked
through to see what follows, but numbers in long lists are skipped unfetched.
The first piece is small, as most of what people ask stands there; later ones grow,
because each request costs a round trip.

Knows nothing of hubs: ``fetch`` is whatever gives a part of a file. Nothing is
kept on disk. How much may be fetched is bounded by what a header may hold
(``models.ggufbytes``).
"""

from collections.abc import Callable

from promptai.models.gguf import GgufHeader, parse_header

#: First byte and length -> these bytes, fewer only where the file ends.
Fetch = Callable[[int, int], bytes]

_FIRST_BYTES = 256 * 1024
_LARGEST_BYTES = 4 * 1024 * 1024


def read_remote_header(
    fetch: Fetch, file_bytes: int, where: str, *, progress: Callable[[int], None] | None = None
) -> GgufHeader:
    """
    Read a GGUF header through ``fetch``, and check the file's size against what the header promises.

    Args:
        file_bytes: Size of the whole file, as its server says.
        where: Its address, for the header and for messages.
        progress: Told how many more bytes have come.

    Raises:
        ModelFormatError: It is empty, not a GGUF, damaged or cut short.
        PromptAIError: Whatever ``fetch`` raises.
    """
    return parse_header(_Window(fetch, file_bytes, progress), file_bytes, where)


class _Window:
    """A file elsewhere, read forwards: what is needed comes with what is likely to be needed next."""

    def __init__(self, fetch: Fetch, file_bytes: int, progress: Callable[[int], None] | None) -> None:
        self._fetch = fetch
        self._file_bytes = file_bytes
        self._progress = progress
        self._position = 0  # of the first byte in ``_held``
        self._held = b""
        self._ahead = _FIRST_BYTES

    def read(self, size: int, /) -> bytes:
        """Give the next ``size`` bytes, fewer only where the file ends or its server stops short."""
        missing = size - len(self._held)
        if missing > 0:
            start = self._position + len(self._held)
            length = min(max(missing, self._ahead), self._file_bytes - start)
            if length > 0:
                came = self._fetch(start, length)[:length]
                self._held += came
                if self._progress is not None:
                    self._progress(len(came))
            self._ahead = min(2 * self._ahead, _LARGEST_BYTES)
        data, self._held = self._held[:size], self._held[size:]
        self._position += len(data)
        return data

    def seek(self, offset: int, _whence: int, /) -> int:
        """Skip ``offset`` bytes; those that have not come stay where they are."""
        self._held = self._held[offset:]
        self._position += offset
        return self._position
