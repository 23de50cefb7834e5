"""A seeded simulator of the whole daemon: real brain, service and hands; simulated time and media.

One history is one seed: `python -m tests.simulate --seed N --steps M`. No threads, no real time.

    clock     virtual time, and processes that can be stopped, resumed and killed
    media     an arena of DRAM, a drive with a volatile cache and faults, an index beside it
    workers   the mover, its steps spread over virtual time
    host      a daemon process put together from the real parts, and the connections to it
    clients   engines: they reserve, copy in steps, commit, acquire, copy out, release
    ledger    what was committed under which name: the judge of every byte
    world     the machine on which all of it happens, and what goes wrong there
    checks    what must hold after every step, and at the end
"""
