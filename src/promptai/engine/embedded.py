"""Run the embedded llama.cpp in its own process: ``python -m promptai.engine.embedded FLAGS_JSON``.

The ``xllamacpp`` wheel is llama-server as a Python extension. A bad model or full memory kills the process that loads
it, so it never runs in the parent, which sees an exit code and a log, as with a native engine. This is the only module
that imports ``xllamacpp``.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from promptai.engine.flags import EngineFlags

#: Exit code when the wheel cannot be imported; the last line of the log is the reason.
EXIT_NO_WHEEL = 97


def main() -> None:
    """Serve one model until SIGTERM; with ``--probe`` only print the wheel's SIMD features."""
    try:
        import xllamacpp  # noqa: PLC0415  some 50 MB that only this process should load
    except ImportError as error:
        sys.stderr.write(f"cannot import xllamacpp: {error}\n")
        sys.exit(EXIT_NO_WHEEL)
    sys.stderr.write(f"system_info: {xllamacpp.get_system_info()}\n")
    sys.stderr.flush()
    if sys.argv[1] == "--probe":
        return
    flags = msgspec.json.decode(sys.argv[1].encode(), type=EngineFlags)
    try:
        server = xllamacpp.Server(_parameters(xllamacpp, flags))
    except RuntimeError as error:
        # llama.cpp logs in its own thread, and the reason comes last: without this pause, 7 of 48 damaged models on a
        # busy machine ended without a reason.
        time.sleep(0.5)
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)  # its threads do not always end on their own
    _leave_on(signal.SIGTERM, lambda: os._exit(0))
    sys.stderr.write(f"listening on {server.listening_address}\n")
    sys.stderr.flush()
    threading.Event().wait()


def _leave_on(signum: signal.Signals, leave: Callable[[], None]) -> None:
    """Replace the wheel's own handler, which waits for streams that have lost their client."""
    signal.signal(signum, lambda _number, _frame: leave())


def _parameters(xllamacpp: Any, flags: EngineFlags) -> Any:
    """Return the wheel's parameters for ``flags``; names follow llama.cpp's ``common_params``."""
    p = xllamacpp.CommonParams()
    p.model.path = flags.model
    p.model_alias = {flags.alias}
    p.hostnames = ["127.0.0.1"]
    p.port = flags.port
    p.n_ctx = flags.context
    p.n_parallel = flags.slots
    p.n_batch = flags.batch
    p.n_ubatch = flags.ubatch
    p.cpuparams.n_threads = flags.threads
    p.cpuparams_batch.n_threads = flags.threads
    types = xllamacpp.ggml_type
    p.cache_type_k = getattr(types, f"GGML_TYPE_{flags.cache_type_k.upper()}")
    p.cache_type_v = getattr(types, f"GGML_TYPE_{flags.cache_type_v.upper()}")
    p.cache_ram_mib = flags.cache_ram_mib
    modes = xllamacpp.llama_load_mode
    p.load_mode = modes.LLAMA_LOAD_MODE_MMAP if flags.mmap else modes.LLAMA_LOAD_MODE_NONE
    p.fit_params = False  # would change context and slots
    p.endpoint_metrics = True
    p.endpoint_slots = True
    if key := os.environ.get("LLAMA_API_KEY"):  # the native llama-server reads it itself
        p.api_keys = [key]
    p.ui = False
    p.offline = True
    return p


if __name__ == "__main__":
    main()
