"""For all tests: Ctrl-C works in the programs that they start, also where a shell runs the tests in the background."""

from __future__ import annotations

import signal

# A shell's background jobs ignore SIGINT, and so do the programs that they start. One that is handled is not ignored
# there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
