"""TensorBoard on a run folder, looked at in a headless Chromium.

`python -m tests.trainer.board RUN PNG` takes the README's picture.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import element_to_be_clickable
from selenium.webdriver.support.ui import WebDriverWait

# A scalar card is drawn once it has a curve, an image card once its picture has pixels.
DRAWN = """
const cards = [...document.querySelectorAll('card-view')];
const name = card => card.querySelector('tb-truncated-path')?.title;
const curve = card => card.querySelector('line-chart canvas, line-chart path') !== null;
const picture = card => [...card.querySelectorAll('img')].some(i => i.naturalWidth > 0);
return cards.filter(c => curve(c) || picture(c)).map(name);
"""
TAGS = "loss|top1|inputs"
WANTED = {"train/loss", "eval/top1", "eval/ema_top1", "train/inputs"}


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serve a folder by TensorBoard; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        WebDriverWait(None, 60, poll_frequency=0.2).until(lambda _: _answers(address, server))
        yield address
    finally:
        server.terminate()
        server.wait()


def _answers(address: str, server: subprocess.Popen[bytes]) -> bool:
    assert server.poll() is None, "TensorBoard ended"
    try:
        with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as reply:
            return reply.status == 200 and reply.read() not in (b"[]", b"")
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def chromium(width: int, height: int) -> Iterator[webdriver.Chrome]:
    """Start a headless Chromium with a profile of its own."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium")
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):  # fmt: skip
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(_program("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed: make setup says how"
    return path


def photograph(logdir: Path, png: Path) -> None:
    """Open the board, wait until loss, accuracy and inputs are drawn, and save a picture of it.

    Raises:
        TimeoutException: naming what was not drawn.
    """
    with tensorboard(logdir) as address, chromium(1880, 760) as driver:
        driver.get(f"{address}/?darkMode=false&smoothing=0&tagFilter={TAGS}#timeseries")
        wait = WebDriverWait(driver, 90)
        # The settings take a quarter of the page: fold them away.
        button = element_to_be_clickable((By.CSS_SELECTOR, "button.settings-button"))
        wait.until(button).click()
        seen: set[str] = set()
        wait.until(lambda _: seen.union(driver.execute_script(DRAWN)) >= WANTED, str(WANTED))
        driver.save_screenshot(str(png))


if __name__ == "__main__":
    photograph(Path(sys.argv[1]), Path(sys.argv[2]))
