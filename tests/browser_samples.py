"""Chromium for tests, driven by selenium: what a person types, what the page shows, and what it asks for."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shutil import which
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 120  # for what a slow machine does; nothing here waits when it is done


class Browser:
    """One window. All texts are what a person sees: `innerText`, without what is hidden."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, address: str, width: int = 1300, dark: bool = False) -> None:
        """width: of the window, in CSS pixels. The logs begin with this page."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(address)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """Waits for it."""
        return self.wait(lambda: next(iter(self.all(selector)), None))

    def wait(self, condition: Callable[[], Any]) -> Any:
        """The first true value."""
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)"
        return self.run(script, selector)

    def press(self, *keys: str) -> None:
        """To what has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def command(self, name: str, **parameters: Any) -> Any:
        """Of Chromium's own protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def requested(self) -> list[str]:
        """Addresses that the page asked for since the last call, its own among them."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def complaints(self) -> list[str]:
        """Of the browser's console: script errors, refusals by the page's policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Without a window. Fails where Chromium or its driver is not installed."""
    programs = {name: which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, f"not installed: {', '.join(missing)}; on Debian: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
