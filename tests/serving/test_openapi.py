"""What `/openapi.json` says is what the server does."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.serving.servers import RunningServer

SECONDS = 300
# TRACE is answered as TensorFlow Serving's HTTP library does: with 501.
METHODS = ["DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT"]


def described(server: RunningServer) -> dict:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as response:
        return json.load(response)


def test_every_reference_leads_somewhere_and_every_operation_has_its_statuses(server: RunningServer):
    document = described(server)
    assert set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))) == set(
        document["components"]["schemas"]
    )
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) > 30
    for path, methods in document["paths"].items():
        (operation,) = methods.values()
        assert {"200"} < set(operation["responses"]) or path == "/healthz"
        assert ("429" in operation["responses"]) == path.endswith(":predict")


def test_integers_have_the_bounds_of_their_type(server: RunningServer):
    paths = described(server)["paths"]
    schemas = paths["/v1/models/types:predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    items = {each["title"]: each["properties"]["inputs"]["properties"]["x"]["items"] for each in schemas}
    assert items["uint8"] == {"type": "integer", "minimum": 0, "maximum": 255}
    assert items["int64"] == {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert items["float64"] == {"type": "number"}
    assert items["bool"] == {"type": "boolean"}
    # What JSON cannot carry is not offered in it.
    assert not items.keys() & {"half", "uint16", "complex64", "bfloat16"}


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_undocumented_status(server: RunningServer, tmp_path: Path):
    command = Path(sys.executable).with_name("schemathesis")
    if shutil.which(command) is None:
        pytest.skip("needs schemathesis: pip install -e '.[fuzz]'")
    (tmp_path / "schemathesis.toml").write_text(f"[phases.coverage]\nunexpected-methods = {json.dumps(METHODS)}\n")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    done = subprocess.run(
        [command, "run", f"{server.url}/openapi.json", "--checks", checks, "--max-time", str(SECONDS),
         "--continue-on-failure", "--seed", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=2 * SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert server.process.poll() is None
