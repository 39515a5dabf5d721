"""What `benchmarks.serving` compares: builds the model, runs it bare, and serves it with its peers."""

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks import measuring

NAME = "fashion_cnn"


def build(folder: Path) -> None:
    """Saves the network as Keras file, and exports it folded."""
    import keras_bn
    from models.networks import fashion_cnn

    model = fashion_cnn()
    model.save(folder / "model.keras")
    keras_bn.export(model, folder / "export")


def bodies(folder: Path, count: int) -> None:
    """Writes the same request for REST, for REST of the second protocol and for gRPC, and the answer to it."""
    import orjson
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    run, dtype = signature(folder)
    images = np.load(folder / f"images{count}.npy")
    pictures = (images / 255).astype(dtype) if np.issubdtype(dtype, np.floating) else images.astype(dtype)
    if np.issubdtype(dtype, np.floating):
        pictures = np.round(pictures, 4)
    np.save(folder / f"body{count}.answer.npy", run(pictures))
    text = orjson.dumps({"instances": pictures}, option=orjson.OPT_SERIALIZE_NUMPY)
    (folder / f"body{count}.json").write_bytes(text)
    tensor = {
        "name": _input_name(folder),
        "shape": pictures.shape,
        "datatype": f"FP{8 * dtype.itemsize}" if np.issubdtype(dtype, np.floating) else f"UINT{8 * dtype.itemsize}",
        "data": pictures.ravel(),
    }
    text = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
    (folder / f"body{count}.v2.json").write_bytes(text)
    request = predict_pb2.PredictRequest()
    request.model_spec.name = NAME
    request.inputs[_input_name(folder)].CopyFrom(tf.make_tensor_proto(pictures))
    message = request.SerializeToString()
    # gRPC's frame: not compressed, and the length.
    (folder / f"body{count}.grpc").write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    np.save(folder / f"pictures{count}.npy", pictures)


def bare(folder: Path, count: int) -> None:
    """Runs the signature for as many seconds as a line of standard input says; prints how often a second it ran."""
    run, _ = signature(folder)
    pictures = np.load(folder / f"pictures{count}.npy")
    for _ in range(5):
        run(pictures)
    for line in sys.stdin:
        begin = time.perf_counter()
        calls = 0
        while time.perf_counter() - begin < float(line):
            run(pictures)
            calls += 1
        print(calls / (time.perf_counter() - begin), flush=True)


def serve(folder: Path, kind: str) -> None:
    """Serves the model with one of the peers on a free port."""
    {"predict": _fastapi, "signature": _fastapi, "litserve": _litserve, "mlserver": _mlserver}[kind](folder, kind)


def _fastapi(folder: Path, kind: str) -> None:
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()
    if kind == "predict":
        import keras

        import keras_bn  # noqa: F401 - the file names its layers

        model = keras.models.load_model(folder / "model.keras")

        @app.post("/predict")
        def predict(body: dict[str, Any]) -> dict[str, Any]:
            return {"predictions": model.predict(np.array(body["instances"], np.float32), verbose=0).tolist()}
    else:
        import orjson

        run, dtype = signature(folder)

        @app.post("/predict")
        async def call(request: Request) -> Response:
            pictures = np.array(orjson.loads(await request.body())["instances"], dtype)
            answer = {"predictions": run(pictures)}
            return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    _say(f"http://127.0.0.1:{listening.getsockname()[1]}/predict")
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run([listening])


def _litserve(folder: Path, kind: str) -> None:
    import litserve

    from benchmarks.serving_litserve import Network

    port = measuring.free_port()
    _say(f"http://127.0.0.1:{port}/predict")
    server = litserve.LitServer(Network(folder), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False, access_log=False)


def _mlserver(folder: Path, kind: str) -> None:
    import asyncio

    from mlserver import MLServer, ModelSettings, Settings
    from mlserver.settings import ModelParameters

    from benchmarks.serving_mlserver import Network

    ports = {f"{name}_port": measuring.free_port() for name in ("http", "grpc", "metrics")}
    # In this process: its workers end with uvloop 0.22 and later, which make no event loop unasked.
    settings = Settings(host="127.0.0.1", debug=False, parallel_workers=0, metrics_dir=str(folder), **ports)
    model = ModelSettings(name=NAME, implementation=Network, parameters=ModelParameters(uri=str(folder)))

    async def run() -> None:
        # Its constructor starts tasks already.
        await MLServer(settings).start([model])

    _say(f"http://127.0.0.1:{ports['http_port']}/v2/models/{NAME}/infer")
    asyncio.run(run())


def _say(url: str) -> None:
    print(f"REST at {url}\nReady", flush=True)


def _loaded(folder: Path) -> Any:
    import tensorflow as tf

    (version,) = (folder / "export").glob("[0-9]*")
    return tf.saved_model.load(str(version)).signatures["serving_default"]


def _input_name(folder: Path) -> str:
    return next(iter(_loaded(folder).structured_input_signature[1]))


def signature(folder: Path) -> tuple[Callable[[np.ndarray], np.ndarray], np.dtype]:
    """The exported signature as a function of arrays, and the dtype that it takes."""
    import tensorflow as tf

    function = _loaded(folder)
    ((name, spec),) = function.structured_input_signature[1].items()
    output = sorted(function.structured_outputs, key=lambda key: key != "probabilities")[0]

    def run(pictures: np.ndarray) -> np.ndarray:
        return function(**{name: tf.constant(pictures)})[output].numpy()

    return run, np.dtype(spec.dtype.as_numpy_dtype)


if __name__ == "__main__":
    command, place, *rest = sys.argv[1:]
    if command == "build":
        build(Path(place))
    elif command == "bodies":
        bodies(Path(place), int(rest[0]))
    elif command == "bare":
        bare(Path(place), int(rest[0]))
    elif command == "serve":
        serve(Path(place), rest[0])
    else:
        sys.exit(f"error: unknown command {command!r}")
