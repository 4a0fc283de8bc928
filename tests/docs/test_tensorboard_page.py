"""A run's directory, opened in TensorBoard, in a browser."""

import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest
import torch

from lightning_custom.events import png_bytes
from lightning_custom.metrics import MetricLogger
from lightning_custom.testing import single_process

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1400,2400",
    "--virtual-time-budget=20000", "--dump-dom",
]  # fmt: skip
TAGS = {"loss/discriminator", "loss/generator", "val/fid", "time/steps_per_second"}
LAYOUT = {"losses": ["loss/"], "quality": ["val/fid$"]}
PICTURE = torch.rand(1, 8, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder with one run in it, which was stopped after step 5 and resumed at step 3 without the tag ``ghost``."""
    folder = tmp_path_factory.mktemp("logs")
    logger = MetricLogger(
        single_process(), folder / "run", hyperparameters={"lr": 0.1}, headline=["val/fid"], layout=LAYOUT
    )
    logger.resume_at(None)
    for step in range(1, 6):
        logger.update({"loss/generator": step / 2, "loss/discriminator": 2.0})
        logger.flush(step)
    logger.record(5, {"ghost": 1.0})
    logger.resume_at(3)
    logger.record(4, {"val/fid": 0.3})
    logger.image(4, "samples", PICTURE)
    return folder


@pytest.fixture(scope="module")
def server(logs):
    """The address of a TensorBoard that serves ``logs`` and ends with the module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_tags(process, f"{address}/data/plugin/timeseries/tags")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for_tags(process, address):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                if b"samples" in response.read():
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.3)
    pytest.fail(f"TensorBoard did not serve the run at {address} (status {process.poll()})")


@pytest.fixture(scope="module")
def open_page(server, tmp_path_factory):
    """``open_page(path)``: the page's elements as text, once its scripts have run."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")

    def open_(path):
        profile = tmp_path_factory.mktemp("profile")
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"{server}/{path}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        try:
            return html.unescape(process.communicate(timeout=120)[0])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    return open_


@pytest.mark.slow
def test_the_runs_scalars_and_pictures_are_on_the_page(open_page, server):
    # A browser on a busy machine may be asked for the page's elements before the server has answered all its questions.
    for _ in range(4):
        page = open_page("?tagFilter=.*#timeseries")
        titles = set(re.findall(r'title="([^"]+)"', page))
        if titles >= TAGS | {"samples"} and "Image at step 4" in page:
            break
    assert titles >= TAGS | {"samples"}
    assert "ghost" not in titles
    (source,) = re.findall(r'<img[^>]* alt="Image at step 4"[^>]* src="([^"]+)"', page)
    with urllib.request.urlopen(f"{server}/{source}", timeout=30) as response:
        assert response.read() == png_bytes(PICTURE)


def ask(server, question, **fields):
    address, content = f"{server}/data/plugin/hparams/{question}", json.dumps(fields).encode()
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def look_up(server, path):
    with urllib.request.urlopen(f"{server}/data/plugin/{path}", timeout=30) as response:
        return json.load(response)


@pytest.mark.slow
def test_the_custom_scalars_tab_gets_the_charts_and_their_curves(server):
    """The layout outlives the cut of a resumed run, and each of its expressions finds curves."""
    (category,) = look_up(server, "custom_scalars/layout")["category"]
    assert {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]} == LAYOUT
    curves = {}
    for (tag,) in LAYOUT.values():
        curves |= look_up(server, f"custom_scalars/scalars?run=run&tag={quote(tag)}")["tag_to_events"]
    assert {tag: [point[1:] for point in points] for tag, points in curves.items()} == {
        "loss/discriminator": [[1, 2.0], [2, 2.0], [3, 2.0]],
        "loss/generator": [[1, 0.5], [2, 1.0], [3, 1.5]],
        "val/fid": [[4, pytest.approx(0.3)]],
    }


@pytest.mark.slow
def test_the_hyperparameters_tab_gets_the_settings_and_their_score(server):
    """What the tab asks the server for; its elements lie in shadow trees, which a dump of the page leaves out."""
    experiment = ask(server, "experiment", experimentName="")
    assert [info["name"] for info in experiment["hparamInfos"]] == ["lr"]
    assert [info["name"]["tag"] for info in experiment["metricInfos"]] == ["val/fid"]
    answer = ask(
        server,
        "session_groups",
        experimentName="",
        allowedStatuses=["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        colParams=[{"metric": {"group": "", "tag": "val/fid"}}],
        startIndex=0,
        sliceSize=10,
    )
    (group,) = answer["sessionGroups"]
    assert group["hparams"] == {"lr": 0.1}
    (value,) = group["metricValues"]
    assert value["value"] == pytest.approx(0.3)
