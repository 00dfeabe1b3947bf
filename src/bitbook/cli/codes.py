"""Exit codes: what a script may rely on."""

DIFFERENT = 1
"""`diff --exit-code` found a difference. Also Python's own for a traceback, which is a bug of bitbook's."""
MISTAKE = 2
"""The command cannot be done as given; one line on standard error says why."""
MISSED = 3
"""The file was written, but is larger than the budget allows."""
INTERRUPTED = 130
"""Stopped by Ctrl-C (128 + SIGINT); what is kept was said."""

EXPLAINED = (
    "Exit codes: 0 done; 1 'diff --exit-code' found differences, or a bug; 2 cannot be done as given; 3 a file was "
    "written that misses its budget; 130 stopped by Ctrl-C."
)
