"""Bodies that come compressed, read piece by piece and bounded."""

import zlib


class Inflater:
    """Reads one gzip member.

    Args:
        limit: How many bytes may come out.
    """

    def __init__(self, limit: int):
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._left = limit
        self._broken = False

    def feed(self, data: bytes) -> bytes:
        """Returns what comes out of the next piece; nothing any more once something was wrong."""
        if self._broken:
            return b""
        try:
            inflated = self._inflater.decompress(data, self._left + 1)
        except zlib.error:
            inflated = b""
            self._broken = True
        self._left -= len(inflated)
        # Bytes behind the member make the size in its trailer a wrong one.
        if self._left < 0 or self._inflater.unused_data:
            self._broken = True
        return b"" if self._broken else inflated

    @property
    def whole(self) -> bool:
        """Whether one member has come, from its beginning to its end, and nothing else."""
        return self._inflater.eof and not self._broken
