"""Environment variables for processes whose resident memory is measured."""

# Freed memory goes back to the machine at once, so that residency is what is alive. It costs time. oneDNN keeps a
# compiled kernel for every shape of a bf16 product, and experts have many.
HONEST = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}
