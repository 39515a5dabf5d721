"""What all requests under way may hold together, so that no traffic fills the memory of the machine."""

import ctypes
import os
import threading
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from keras_bn_serving.errors import ResourceExhaustedError, UnavailableError
from keras_bn_serving.sizes import size_text

# A part of what is set aside is left to the allocator, which does not fill its pages.
_FILLED = 0.8
# After so many bytes have been given back, the allocator is asked for the pages that it keeps.
_TRIM_BYTES = 64 * 1024 * 1024
# What small requests give back is used again by the next ones.
_LARGE_BYTES = 1024 * 1024


class BusyError(UnavailableError):
    """Others hold too much memory now."""

    def __init__(self) -> None:
        super().__init__("The requests under way hold as much memory as they may. Try again later.")


class Memory:
    """Bytes that are set aside for requests.

    What a request takes is estimated before it is taken. What a model needs while it runs is not counted.

    Args:
        size: How many bytes there are.
    """

    def __init__(self, size: int):
        self.limit = int(size * _FILLED)
        self._lock = threading.Lock()
        self._held = 0
        self._given_back = 0
        # Only glibc has it; others give pages back by themselves.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

    @property
    def held(self) -> int:
        """How many bytes are held now."""
        return self._held

    def share(self) -> "Share":
        """Returns a share of it that holds nothing yet."""
        return Share(self)

    def _add(self, size: int) -> bool:
        with self._lock:
            if size > 0 and self._held + size > self.limit:
                return False
            self._held += size
            self._given_back += -size if -size > _LARGE_BYTES else 0
            trim = self._given_back > _TRIM_BYTES
            if trim:
                self._given_back = 0
        if trim and self._trim is not None:
            threading.Thread(target=self._trim, args=(0,), name="malloc-trim", daemon=True).start()
        return True


class Share:
    """What one request holds; nothing any more once the block that it opens has ended."""

    __slots__ = ("_held", "_memory")

    def __init__(self, memory: Memory):
        self._memory = memory
        self._held = 0

    @property
    def held(self) -> int:
        """How many bytes it holds now."""
        return self._held

    def hold(self, size: int, beside: int = 0) -> None:
        """Holds this many bytes from now on, instead of what was held before.

        Args:
            size: How many.
            beside: How many the same request holds by another share.

        Raises:
            BusyError: If others hold too much for that now.
            ResourceExhaustedError: If it is more than there is.
        """
        if size + beside > self._memory.limit:
            raise ResourceExhaustedError(
                f"The request needs {size_text(size + beside)} of memory; {size_text(self._memory.limit)} are set "
                "aside for all requests together (--request_memory_in_mb)."
            )
        if not self._memory._add(size - self._held):
            raise BusyError
        self._held = size

    def __enter__(self) -> "Share":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hold(0)


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns how many bytes arrays take, with the strings in them."""
    return sum(
        array.nbytes + (sum(map(len, array.ravel().tolist())) if array.dtype == object else 0)
        for array in arrays.values()
    )
