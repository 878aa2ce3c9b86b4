"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    # A shell without job control starts background jobs with Ctrl-C ignored, and programs inherit that: the tests of
    # interrupted work would wait for an interrupt that never comes.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
