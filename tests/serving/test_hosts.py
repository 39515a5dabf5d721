"""By which names browsers may ask, and who else may: against pages that have their name lead to the server."""

import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tensorflow as tf
from keras_bn_serving.config import flags
from keras_bn_serving.rest.hosts import AllowedHosts

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

EVIL = "evil.example:8501"
PAGE = {"Accept": "text/html"}
STATUS, LIST, QUESTION = "/v1/models/m", "/page/models", "/v1/models/m:predict"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that doubles."""
    base = tmp_path_factory.mktemp("hosts")
    saved_models.export(
        base / "1", {"serving_default": (lambda x: {"y": x * 2.0}, [tf.TensorSpec([None], tf.float32, name="x")])}
    )
    return base


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[RunningServer]:
    """As it is started without flags about hosts."""
    with running_server("--model_name=m", f"--model_base_path={base}") as running:
        yield running


def ask(
    server: RunningServer, path: str, host: str, headers: dict[str, str] | None = None, body: str | None = None
) -> tuple[int, bytes]:
    """Asks for a host, whatever its address is."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {"Host": host, **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/", LIST, "/page/page.js", "/page/models/m/versions/1", "/openapi.json"])
def test_the_page_and_what_it_calls_answer_no_strange_host(server: RunningServer, path: str):
    status, body = ask(server, path, EVIL, PAGE)
    assert (status, json.loads(body)["error"]) == (
        403,
        "Browsers may not ask for the host 'evil.example:8501'. To allow it, start the server with "
        "--allowed_hosts=evil.example.",
    )
    for host in ("localhost", "LocalHost:99", "127.0.0.1:8501", "[::1]:8501", "[0:0:0:0:0:0:0:1]", "localhost."):
        assert ask(server, path, host, PAGE)[0] == 200, host


@pytest.mark.parametrize("header", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "none"}])
@pytest.mark.parametrize(("path", "body"), [(STATUS, None), (QUESTION, '{"instances": [1.0]}'), ("/healthz", None)])
def test_what_a_browser_asks_is_refused_for_a_strange_host_and_answered_for_our_own(
    server: RunningServer, header: dict[str, str], path: str, body: str | None
):
    assert ask(server, path, EVIL, header, body)[0] == 403
    assert ask(server, path, "localhost:8501", header, body)[0] == 200


@pytest.mark.parametrize("host", [EVIL, "serving.default.svc.cluster.local:8501", "10.1.2.3", "", "no host at all"])
def test_programs_ask_by_any_name_as_with_tensorflow_serving(server: RunningServer, host: str):
    assert ask(server, STATUS, host)[0] == 200
    # As Node's `fetch` does it.
    node = {"Sec-Fetch-Mode": "cors", "Accept-Language": "*", "User-Agent": "node"}
    status, body = ask(server, QUESTION, host, node, '{"instances": [1.0]}')
    assert (status, json.loads(body)) == (200, {"predictions": [2.0]})
    assert ask(server, "/healthz", host)[0] == ask(server, "/readyz", host)[0] == 200
    # There is no page there, which does not depend on the name.
    assert ask(server, "/", host)[0] == 404


def test_a_browser_is_told_that_the_page_loads_nothing_from_elsewhere(server: RunningServer):
    with urllib.request.urlopen(urllib.request.Request(server.url, headers=PAGE), timeout=60) as response:
        policy = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
        assert response.headers["Content-Security-Policy"] == policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_of_a_whole_url_its_own_host_counts(server: RunningServer):
    assert ask(server, f"http://{EVIL}{LIST}", "localhost")[0] == 403
    assert ask(server, f"http://localhost:8501{LIST}", EVIL)[0] == 200


@pytest.mark.parametrize("flag", ["--allowed_hosts=models.example,[fd00::1]", "--allowed_hosts=*"])
def test_other_hosts_are_allowed_by_a_flag(base: Path, flag: str):
    with running_server("--model_name=m", f"--model_base_path={base}", flag) as server:
        for host in ("models.example", "Models.Example:80", "[fd00:0::1]:8501", "localhost"):
            assert ask(server, LIST, host)[0] == 200, host
        assert ask(server, LIST, EVIL)[0] == (200 if flag.endswith("*") else 403)


def test_where_any_page_may_ask_only_the_page_itself_needs_a_name(base: Path):
    flag = "--rest_api_enable_cors_support"
    with running_server("--model_name=m", f"--model_base_path={base}", flag) as server:
        assert ask(server, STATUS, EVIL, {"Origin": "http://app.example"})[0] == 200
        assert ask(server, LIST, EVIL, {"Origin": "http://app.example"})[0] == 403


def test_without_the_page_there_is_nothing_of_it(base: Path):
    with running_server("--model_name=m", f"--model_base_path={base}", "--enable_page=false") as server:
        for path in ("/", "/page/page.js", LIST, "/page/models/m/versions/1"):
            assert ask(server, path, "localhost", PAGE)[0] == ask(server, path, EVIL, PAGE)[0] == 404, path
        assert ask(server, STATUS, "localhost")[0] == 200


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_who_listens_everywhere_may_be_asked_for_by_any_address_and_no_other_name(address: str):
    hosts = AllowedHosts((), address)
    assert all(map(hosts.allow, ("192.168.1.7:8501", "[fd00::7]", "localhost:8501")))
    assert not any(map(hosts.allow, ("evil.example", "", "1.2.3.4.evil.example", "[::1", "localhost@evil.example")))


def test_who_listens_at_one_address_is_asked_for_by_that_one():
    hosts = AllowedHosts((), "10.0.0.7")
    assert hosts.allow("10.0.0.7:8501")
    assert not hosts.allow("10.0.0.8:8501")
    assert AllowedHosts((), "fd00::7").allow("[FD00:0:0::7]:8501")


@pytest.mark.parametrize("text", ["", "http://a.example", "a.example:80", "a b", "a,,b/c"])
def test_hosts_with_more_than_a_name_are_refused(text: str):
    with pytest.raises(flags.UsageError, match="must be host names or addresses without scheme and port"):
        flags.parse([f"--allowed_hosts={text}", "--model_base_path=/m"])
