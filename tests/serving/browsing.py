"""What a person does with the server's page, in a real browser."""

from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

PATIENCE = 30
DESKTOP, PHONE = (1240, 1180), (390, 844)
# Questions are kept back until they are let go, one by one.
_HOLD = """
const real = window.fetch;
window.held = [];
window.fetch = (url, options) => options?.method !== "POST" ? real(url, options)
  : new Promise((go) => window.held.push(() => go(real(url, options))));
"""
_OVERFLOWING = """
return [...document.querySelectorAll("body *")].filter((each) => {
  const box = each.getBoundingClientRect();
  const scrolls = each.closest("nav, pre");
  return box.width && !scrolls && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map((each) => each.outerHTML.slice(0, 100));
"""
# Of every text that is seen its contrast with what is behind it, as WCAG reckons it.
_CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], below) => [r, g, b].map((each, at) => each * a + below[at] * (1 - a));
const behind = (each) => {
  if (!each) return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  const colour = channels(getComputedStyle(each).backgroundColor);
  return colour[3] === 0 ? behind(each.parentElement) : over(colour, behind(each.parentElement));
};
const light = (colour) => colour.map((each) => each / 255)
  .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
  .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
return [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility()
  && [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((each) => {
  const ground = behind(each);
  const pair = [light(over(channels(getComputedStyle(each).color), ground)), light(ground)].sort((a, b) => b - a);
  return [(pair[0] + 0.05) / (pair[1] + 0.05), each.textContent.trim().slice(0, 60)];
});
"""


class Page:
    """The page in a browser.

    Args:
        driver: Of the browser.
        url: Of the server.
    """

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        self.url = url
        self.keys = webdriver.Keys

    def open(self, wait_for: str) -> "Page":
        """Opens it afresh and waits for an element."""
        self.driver.get(self.url)
        self.find(wait_for)
        return self

    def find(self, selector: str) -> WebElement:
        """Waits for an element that is there."""
        return WebDriverWait(self.driver, PATIENCE).until(
            lambda driver: driver.find_element(By.CSS_SELECTOR, selector), f"no {selector}"
        )

    def all(self, selector: str) -> list[WebElement]:
        """The elements that are there now."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What can be read of an element once it is there."""
        return self.find(selector).text

    def wait_for_text(self, selector: str, text: str) -> None:
        """Waits until an element says something."""
        WebDriverWait(self.driver, PATIENCE).until(
            lambda driver: any(text in each.text for each in driver.find_elements(By.CSS_SELECTOR, selector)),
            f"{selector} does not say {text!r}",
        )

    def wait_until(self, holds: Callable[[], Any]) -> None:
        """Waits until something holds."""
        WebDriverWait(self.driver, PATIENCE).until(lambda _: holds())

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs a script in the page; returns what it returns."""
        return self.driver.execute_script(script, *arguments)

    def click(self, selector: str) -> None:
        """Clicks once the element is there."""
        self.find(selector).click()

    def choose(self, selector: str, value: str) -> None:
        """Chooses of a list."""
        Select(self.find(selector)).select_by_visible_text(value)

    def write(self, name: str, text: str) -> None:
        """Writes an input."""
        area = self.find(f"textarea#input-{name}")
        area.clear()
        area.send_keys(text)

    def ask(self) -> None:
        """Sends the question."""
        self.click("#ask")

    def bars(self, within: str = "#view") -> dict[str, float]:
        """The bars of the answer, in order, once there are any."""
        self.find(f"#answer:not([hidden]) {within} .bar")
        rows = self.all(f"#answer:not([hidden]) {within} .bar")
        return {
            row.find_element(By.CSS_SELECTOR, "span").text: float(
                row.find_element(By.CSS_SELECTOR, "output").text.removesuffix(" %")
            )
            for row in rows
        }

    def draw_shoe(self) -> None:
        """Draws with the mouse: a sole along the bottom, a toe, a heel."""
        canvas = self.find("canvas#input-image")
        size = canvas.size["width"] / 224
        moves = webdriver.ActionChains(self.driver)
        shoe = ([(-80, 70), (80, 70)], [(-80, 50), (80, 50)], [(80, 30), (-10, 30), (-80, 60)], [(70, 30), (70, 10)])
        for path in shoe:
            moves.move_to_element_with_offset(canvas, *(round(size * each) for each in path[0])).click_and_hold()
            for place in path[1:]:
                moves.move_to_element_with_offset(canvas, *(round(size * each) for each in place))
            moves.release()
        moves.perform()

    def pixel(self, x: int, y: int) -> int:
        """How light the drawing is at a place."""
        return self.run(
            "const context = document.querySelector('canvas#input-image').getContext('2d');"
            "return context.getImageData(...arguments, 1, 1).data[0]",
            x,
            y,
        )

    def hold(self) -> None:
        """Keeps questions back from now on."""
        self.run(_HOLD)

    def let_go(self) -> None:
        """Lets the next question go that is kept back."""
        WebDriverWait(self.driver, PATIENCE).until(lambda _: self.run("return window.held.length > 0"))
        self.run("window.held.shift()()")

    def resize(self, size: tuple[int, int]) -> None:
        """Gives the screen another size; that of a phone is looked at with a finger."""
        mobile = size[0] < 600
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile},
        )

    def prefer(self, scheme: str) -> None:
        """Prefers light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def overflowing(self) -> list[str]:
        """The elements that stand out to the side of the screen."""
        return self.run(_OVERFLOWING)

    def contrasts(self) -> list[tuple[float, str]]:
        """Every text that is seen with its contrast."""
        return [(contrast, text) for contrast, text in self.run(_CONTRASTS)]
