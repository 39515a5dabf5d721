"""The network of `benchmarks.serving` as LitServe runs it, in a process of its own."""

from pathlib import Path
from typing import Any

import litserve
import numpy as np

from benchmarks import serving_peers


class Network(litserve.LitAPI):
    """Answers with the exported signature.

    Args:
        folder: Where the export is.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def setup(self, device: str) -> None:
        """Loads it."""
        self._run, self._dtype = serving_peers.signature(self._folder)

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        """The images of a body."""
        return np.array(request["instances"], self._dtype)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Runs it."""
        return self._run(x)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        """The body of the answer."""
        return {"predictions": output.tolist()}
