"""What every test may rely on, however the tests were started."""

from __future__ import annotations

import signal

# A shell without job control starts what is in the background with SIGINT ignored, and children inherit that: then no Ctrl-C of a
# test would reach the program it is for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
