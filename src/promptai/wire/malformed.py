"""What decoding bytes from outside can raise, in one tuple.

msgspec reports wrong JSON and wrong types as ``MsgspecError``, but bytes that are
not UTF-8 as ``UnicodeDecodeError`` and nesting without end as ``RecursionError``.
Whoever decodes what strangers wrote catches all three.
"""

import msgspec

MALFORMED: tuple[type[Exception], ...] = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
