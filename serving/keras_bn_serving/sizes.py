"""Numbers of bytes, as people read them."""


def size_text(size: int) -> str:
    """Such as `100 bytes`, `1.2 KiB`, `3.4 MiB`."""
    if size < 1024:
        return f"{size} bytes"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = next((n for n in range(1, len(units)) if round(size / 1024**n, 1) < 1024), len(units))
    return f"{size / 1024**power:.1f} {units[power - 1]}"


def exact_size_text(size: int) -> str:
    """`size_text`, and to the byte where that rounds."""
    return size_text(size) if size < 1024 else f"{size_text(size)} ({size:,} bytes)"
