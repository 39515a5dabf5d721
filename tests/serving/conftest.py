"""Models and servers that the serving tests share."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serving import odd_models, saved_models
from tests.serving.servers import RunningServer, running_server

if TYPE_CHECKING:
    from selenium import webdriver

CONFIG = """
model_config_list {{
  config {{
    name: "half_plus_two" base_path: "{base}/half_plus_two" model_platform: "tensorflow"
    model_version_policy {{ all {{}} }}
    version_labels {{ key: "stable" value: 1 }}
    version_labels {{ key: "canary" value: 2 }}
  }}
  {others}
}}
"""
OTHERS = ("multi", "strings", "types", "scalar", "matrix", "image", "totals", "faulty", "examples", *odd_models.NAMES)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the recorded answers, one folder each."""
    folder = saved_models.build_all(tmp_path_factory.mktemp("models"))
    odd_models.build_all(folder)
    return folder


@pytest.fixture(scope="session")
def models_config(models_folder: Path) -> Path:
    """The configuration that the recorded answers were given under."""
    path = models_folder / "models.config"
    others = "\n".join(
        f'  config {{ name: "{name}" base_path: "{models_folder / name}" model_platform: "tensorflow" }}'
        for name in OTHERS
    )
    path.write_text(CONFIG.format(base=models_folder, others=others))
    return path


@pytest.fixture(scope="session")
def server(models_config: Path) -> Iterator[RunningServer]:
    """A server of all the models."""
    flags = ("--allow_version_labels_for_unavailable_models", "--enable_model_management")
    with running_server(f"--model_config_file={models_config}", *flags) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator["webdriver.Chrome"]:
    """A headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_binary = shutil.which("chromedriver")
    if not binary or not driver_binary:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(driver_binary))
    yield driver
    driver.quit()
