"""Environment variables for processes whose resident memory is measured."""

# malloc returns freed memory to the machine at once, so that resident memory is memory in use; this costs time. oneDNN
# caches a compiled kernel for every shape of a bf16 product, and experts have many shapes.
HONEST = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}
