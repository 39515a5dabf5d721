"""Predict, classify and regress over REST: bodies read and answers written, on the event loop only what is small."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any

import numpy as np
from tensorflow_serving.apis import input_pb2

from keras_bn_serving.codec.answer import encode_classifications, encode_error, encode_predict, encode_regressions
from keras_bn_serving.codec.examples import decode_examples
from keras_bn_serving.codec.tensor import PredictInput, decode_plain, decode_predict
from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine.arrivals import Arrivals
from keras_bn_serving.engine.background import Background, GoOn
from keras_bn_serving.engine.memory import Memory, Share, size_of
from keras_bn_serving.engine.repository import Lease
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.rest.messages import Request, Response

# What grows with a body or an answer keeps other connections waiting: at once only what takes a millisecond or less.
SMALL_BYTES = 64 * 1024
_AT_ONCE_BYTES = 1024
_AT_ONCE_VALUES = 2048
# Bytes of memory at the worst, measured: for a byte of a body that is a list of numbers, and of any other; for a value
# of an answer, and for a byte of the array that it stands in.
_PLAIN_COST = 25
_DOCUMENT_COST = 40
_VALUE_COST = 150
_STRING_COST = 6


class Predictions:
    """Answers requests that run a model.

    Args:
        service: What answers.
        memory: What requests may hold.
        background: Where bodies are read and answers written that take long.
        timeout_seconds: How long an answer may take.
        loop: Where all of this runs.
    """

    def __init__(
        self,
        service: PredictionService,
        memory: Memory,
        background: Background,
        timeout_seconds: float,
        loop: asyncio.AbstractEventLoop,
    ):
        self._service = service
        self._memory = memory
        self._background = background
        self._timeout_seconds = timeout_seconds
        self._loop = loop
        self._arrivals = Arrivals(loop)

    async def predict(self, spec: ModelSpec, request: Request) -> Response:
        """Answers a predict request."""
        taken: list[Lease] = []
        find_inputs = self._taking(spec, taken)
        reading: Future[PredictInput] | None = None

        def release(_: object = None) -> None:
            for lease in taken:
                lease.release()

        body, share = request.body, request.share
        try:
            understood = decode_plain(body, find_inputs) if len(body) <= SMALL_BYTES else None
            if understood is None and len(body) <= _AT_ONCE_BYTES:
                understood = decode_predict(body, find_inputs)
            if understood is None:
                reading, read = self._background.start(
                    lambda go_on: self._decode(request, find_inputs, go_on), self._timeout_seconds
                )
                understood = await read
            if len(body) > SMALL_BYTES:
                share.hold(share.held + size_of(understood.inputs))
            arrival = self._arrivals.expect()
            task = self._service.predict(
                taken[0],
                understood.signature_name,
                understood.inputs,
                arrival.finish,
                start=self._loop.call_soon,
                limited=True,
            )
        except BaseException:
            release()
            if reading is not None:
                # The reading goes on for a while where the request is given up, and may take its lease only then.
                reading.add_done_callback(release)
            raise
        outputs = await arrival.result(self._timeout_seconds, task.cancel)
        row_format = understood.row_format
        return await self._write(share, outputs, lambda: encode_predict(outputs, row_format))

    async def examine(self, spec: ModelSpec, request: Request, method: str) -> Response:
        """Answers a request about examples: `method` is classify or regress."""
        body, share = request.body, request.share
        if len(body) <= _AT_ONCE_BYTES:
            signature_name, message = decode_examples(body)
        else:

            def decode(go_on: GoOn) -> tuple[str, input_pb2.Input]:
                with self._memory.share() as working:
                    working.hold(_DOCUMENT_COST * len(body), share.held)
                    return decode_examples(body, go_on)

            _, read = self._background.start(decode, self._timeout_seconds)
            signature_name, message = await read
        share.hold(share.held + message.ByteSize())
        lease = self._service.lease(spec)
        try:
            run = self._service.classify if method == "classify" else self._service.regress
            arrival = self._arrivals.expect()
            task = run(lease, signature_name, message, arrival.finish, limited=True)
        except BaseException:
            lease.release()
            raise
        result = await arrival.result(self._timeout_seconds, task.cancel)
        if method == "regress":
            return await self._write(share, {"": result}, lambda: encode_regressions(result))
        arrays = {"labels": result.labels, "scores": result.scores}
        return await self._write(share, arrays, lambda: encode_classifications(result.labels, result.scores))

    async def error(self, message: str) -> bytes:
        """Encodes an error's text, which may quote a value that is as long as a body."""
        if len(message) <= SMALL_BYTES:
            return encode_error(message)
        _, encoded = self._background.start(lambda go_on: encode_error(message))
        return await encoded

    def _taking(self, spec: ModelSpec, taken: list[Lease]) -> Callable[[str], Mapping[str, TensorSpec]]:
        def find_inputs(signature_name: str) -> Mapping[str, TensorSpec]:
            if not taken:
                taken.append(self._service.lease(spec))
            return self._service.input_specs(taken[0], signature_name)

        return find_inputs

    def _decode(self, request: Request, find_inputs: Any, go_on: GoOn) -> PredictInput:
        body, held = request.body, request.share.held
        with self._memory.share() as share:
            share.hold(_PLAIN_COST * len(body), held)
            plain = decode_plain(body, find_inputs)
            if plain is not None:
                return plain
            go_on()
            share.hold(_DOCUMENT_COST * len(body), held)
            return decode_predict(body, find_inputs, go_on)

    async def _write(
        self, share: Share, arrays: Mapping[str, np.ndarray | None], encode: Callable[[], bytes]
    ) -> Response:
        """Encodes an answer; on the loop only where it has few values."""
        count = sum(array.size for array in arrays.values() if array is not None)
        # Of strings it takes a look to know how large they are.
        if count <= _AT_ONCE_VALUES and not any(
            array is not None and array.dtype == object for array in arrays.values()
        ):
            return Response(HTTPStatus.OK, encode())
        size = size_of({name: array for name, array in arrays.items() if array is not None})
        if count <= _AT_ONCE_VALUES and size <= SMALL_BYTES:
            return Response(HTTPStatus.OK, encode())
        share.hold(share.held + size)

        def write(go_on: GoOn) -> bytes:
            with self._memory.share() as working:
                working.hold(_VALUE_COST * count + _STRING_COST * size, share.held)
                return encode()

        _, encoded = self._background.start(write, self._timeout_seconds)
        text = await encoded
        # The arrays are done with; the text stays until it is sent.
        share.hold(share.held - size + len(text))
        return Response(HTTPStatus.OK, text)
