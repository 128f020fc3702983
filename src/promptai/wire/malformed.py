"""The exceptions that decoding untrusted bytes can raise, in one tuple.

msgspec reports invalid JSON and wrong types as ``MsgspecError``, but bytes that are not UTF-8 as
``UnicodeDecodeError`` and endless nesting as ``RecursionError``. Code that decodes untrusted bytes catches all three.
"""

import msgspec

MALFORMED: tuple[type[Exception], ...] = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
