"""The cookbook's server; the shell scripts run in `make cookbook-short`."""

from __future__ import annotations

import http.client
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SERVE = Path(__file__).parents[2] / "examples" / "cookbook" / "serve.py"


@pytest.fixture
def server():
    command = [sys.executable, SERVE, "--model", "digits-small", "--port", "0"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield int(run.stdout.readline().split(":")[2].split("/")[0])
    finally:
        run.kill()
        run.communicate()


def ask(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


def test_a_seed_is_a_picture(server):
    status, data = ask(server, "/7.png?class=3")
    assert status == 200
    with Image.open(io.BytesIO(data)) as image:
        assert np.asarray(image).shape == (16, 16, 3)
    assert ask(server, "/7.png?class=3") == (200, data)
    assert ask(server, "/8.png?class=3")[1] != data
    for path, code in (("/", 404), ("/x.png", 404), ("/7.png?class=11", 400), ("/7.png?class=a", 400)):
        assert ask(server, path)[0] == code
