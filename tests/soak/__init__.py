"""Programs that hurt a real daemon and its clients for minutes, count, and print what they saw.

    python -m tests.soak.kill       kill -9 of everybody under load, every byte checked; --reboot
    python -m tests.soak.linear     histories of many threads: is there an order that explains them
    python -m tests.soak.restart    a full arena: from the start of the daemon to the first hit
    python -m tests.soak.deaths     thousands of clients die: is what they held free, does it leak
    python -m tests.soak.deadlines  no call outlasts its deadline, whatever the daemon does

Each ends with 1 when a figure misses its bar. `tests/test_soak.py` runs small sizes of all.
"""
