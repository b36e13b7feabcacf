"""Where alerts begin: the same numbers in Prometheus' rules and on the dashboard."""

QUIET_SECONDS = 600
"""Without an applied step."""
LOW_GOODPUT = 0.8
OLD_SAVE_SECONDS = 7200
REFUSALS = 5
"""More than so many in ten minutes."""
FEW_CODEWORDS, LEARNT_STEPS = 0.02, 1000
"""A smaller share of the codewords is in use, after so many steps."""
WAITING_SHARE = 0.1
"""Of the time of a step, waiting for its batch."""
SLOW_RANK = 1.3
"""Times the median."""
RESTARTS = 4
"""So many or more within an hour."""
FULL_DISK = 0.1
"""A smaller share of a disk is free."""
