"""How processes are started whose resident memory is measured."""

# Freed memory goes back to the machine at once, so that residency is what is alive. It costs time.
HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
