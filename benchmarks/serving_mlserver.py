"""The network of `benchmarks.serving` as MLServer runs it, in a process of its own."""

from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks import serving_peers


class Network(MLModel):
    """Answers with the exported signature."""

    async def load(self) -> bool:
        """Loads it from the folder that the settings name."""
        self._run, _ = serving_peers.signature(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Runs it on the one input."""
        answer = self._run(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("predictions", answer)])
