def get_device_compute_capability() -> tuple[int, int]:
    return (9, 0)  # Hopper's
