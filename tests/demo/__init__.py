"""The demonstration: a real model prefills, offloads, restarts, reloads; `make demo` runs it."""
