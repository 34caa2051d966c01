"""`cmtool studio`: what the server answers and whom it refuses, and the page in a browser."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool import generate, starts
from cmtool.io import checkpoint
from cmtool.io.images import from_uint8, to_uint8
from cmtool.io.kernels import read_kernel
from cmtool.studio import server as module
from cmtool.studio.server import Studio
from tests.browser import CHROMIUM, Browser


@pytest.fixture(scope="module")
def model(folder):
    return checkpoint.load(folder / "student.safetensors")


@pytest.fixture(scope="module")
def studio(folder, model):
    with Studio(model, str(folder / "student.safetensors")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def data_url(array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def decoded(url) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def ask(studio, path=None, *, method="POST", body=b"", headers=None, raw_length=None):
    connection = http.client.HTTPConnection("127.0.0.1", studio.server_port, timeout=30)
    try:
        path = f"/{studio.token}/edit" if path is None else path
        given = {"Content-Type": "application/json"} | (headers or {})
        connection.putrequest(method, path, skip_host="Host" in given)
        for name, value in given.items():
            connection.putheader(name, value)
        if raw_length is not False:
            connection.putheader("Content-Length", str(len(body) if raw_length is None else raw_length))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def edit(studio, **asked):
    status, body, _ = ask(studio, body=json.dumps(asked).encode())
    return status, json.loads(body)


HOLE = np.zeros((8, 8, 3), np.uint8)
HOLE[2:6, 3:7] = 255


@pytest.mark.parametrize("task", module.TASKS)
def test_answers_are_those_of_the_library(studio, model, picture, task):
    small = task == "superres"
    image = picture[:4, :4] if small else picture
    status, told = edit(
        studio,
        task=task,
        image=data_url(image),
        mask=data_url(HOLE),
        seed=5,
        count=2,
        steps=3,
        factor=2,
        blur=0.8,
        sigma=20,
        label=1,
    )
    assert status == 200, told
    known = from_uint8(torch.from_numpy(image.copy()).permute(2, 0, 1))[None]
    common = {"seeds": [5, 6], "labels": 1}
    expected = {
        "inpaint": lambda: generate.inpaint(model, known, torch.from_numpy(HOLE[None, ..., 0] > 0), steps=3, **common),
        "colorize": lambda: generate.colorize(model, known, steps=3, **common),
        "superres": lambda: generate.superres(model, known, 2, steps=3, **common),
        "deblur": lambda: generate.deblur(model, known, read_kernel("gaussian:0.8"), steps=3, **common),
        "stroke": lambda: starts.stroke(model, known, **common),
        "denoise": lambda: starts.denoise(model, known, sigma=20 / 127.5, labels=1),
    }[task]()
    made = [decoded(one["image"]) for one in told["images"]]
    assert [one["seed"] for one in told["images"]] == ([5] if task == "denoise" else [5, 6])
    assert np.array_equal(np.stack(made), to_uint8(expected).permute(0, 2, 3, 1).numpy())
    assert told["seconds"] > 0


def test_only_the_page_itself_is_answered(studio):
    assert studio.server_address[0] == "127.0.0.1"
    page, token, port = f"/{studio.token}/", studio.token, studio.server_port
    status, body, headers = ask(studio, page, method="GET")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"cmtool studio" in body
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert ask(studio, page, method="GET", headers=own)[0] == 200
    for path, given in (
        ("/", {}),
        ("/wrong/", {}),
        (f"/{token[:-1]}/", {}),
        ("", {}),
        (page, {"Host": "evil.example"}),
        (page, {"Host": f"evil.example:{port}"}),
        (page, {"Origin": "https://evil.example"}),
        (page, {"Origin": "null"}),
    ):
        status, body, _ = ask(studio, path or "x", method="GET", headers=given)
        assert status == 403, (path, given)
        assert token.encode() not in body
    assert ask(studio, f"/{token}/edit", headers={"Origin": "https://evil.example"})[0] == 403
    assert ask(studio, f"/{token}/other", method="GET")[0] == 404
    assert ask(studio, f"/{token}/other")[0] == 404
    assert ask(studio, f"/{token}/../etc/passwd", method="GET")[0] == 404
    assert ask(studio, page, method="DELETE")[0] == 501


def test_uploads_have_limits(studio):
    assert ask(studio, raw_length=False)[0] == 411
    assert ask(studio, raw_length="-5")[0] == 411
    assert ask(studio, raw_length=module.MOST_BYTES + 1)[0] == 413
    assert ask(studio, body=b"x", headers={"Content-Type": "text/plain"})[0] == 415
    for body in (b"", b"no json", b"[1]", b"\xff\xfe", b"[" * 100_000):
        assert ask(studio, body=body)[0] == 400
    header = io.BytesIO()
    Image.new("L", (1, 1)).save(header, "PNG")
    huge = bytearray(header.getvalue())
    huge[16:24] = (20_000).to_bytes(4, "big") * 2  # what the header says of the size
    import zlib

    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    status, told = edit(studio, task="colorize", image="data:image/png;base64," + base64.b64encode(huge).decode())
    assert status == 400
    assert "pixels" in told["error"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"task": "rm"}, "no task 'rm'"),
        ({}, "no task None"),
        ({"task": "colorize"}, "there is no image"),
        ({"task": "colorize", "image": 3}, "there is no image"),
        ({"task": "colorize", "image": "data:image/png;base64,%%"}, "the image is damaged"),
        ({"task": "colorize", "image": "data:image/png;base64,AAAA"}, "not an image"),
        ({"task": "colorize", "image": "file:///etc/passwd"}, "there is no image"),
        ({"task": "inpaint", "image": "GOOD"}, "there is no mask"),
        ({"task": "inpaint", "image": "GOOD", "mask": "SMALL"}, "another size"),
        ({"task": "stroke", "image": "SMALL"}, "4x4"),
        ({"task": "stroke", "image": "GOOD", "seed": -1}, "seed is a whole number"),
        ({"task": "stroke", "image": "GOOD", "seed": 1.5}, "seed is a whole number"),
        ({"task": "stroke", "image": "GOOD", "seed": True}, "seed is a whole number"),
        ({"task": "stroke", "image": "GOOD", "count": 17}, "count is a whole number"),
        ({"task": "colorize", "image": "GOOD", "steps": 0}, "steps is a whole number"),
        ({"task": "superres", "image": "GOOD", "factor": 1}, "factor is a whole number"),
        ({"task": "colorize", "image": "GOOD", "label": 9}, "label is a whole number"),
        ({"task": "deblur", "image": "GOOD", "blur": -1}, "the blur is a number"),
        ({"task": "deblur", "image": "GOOD", "blur": "1"}, "the blur is a number"),
        ({"task": "denoise", "image": "GOOD", "sigma": "x"}, "the noise is a number"),
        ({"task": "denoise", "image": "GOOD", "sigma": 1e5}, "knows noise up to"),
    ],
)
def test_mistakes_are_told(studio, picture, asked, words):
    images = {"GOOD": data_url(picture), "SMALL": data_url(picture[:4, :4])}
    status, told = edit(
        studio, **{name: images.get(value, value) if isinstance(value, str) else value for name, value in asked.items()}
    )
    assert status == 400
    assert words in told["error"]
    assert told["hint"]


def test_a_port_that_is_taken(studio, model):
    from cmtool.errors import UsageError

    with pytest.raises(UsageError, match=f"--port {studio.server_port}"):
        Studio(model, "model", studio.server_port)


def test_the_command_serves_until_it_is_told_to_end(student):
    run = subprocess.Popen(
        [sys.executable, "-m", "cmtool", "studio", "--model", str(student), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # what a shell's job may not have
    )
    try:
        address = run.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        port, token = int(address.split(":")[2].split("/")[0]), address.split("/")[3]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", f"/{token}/model")
        about = json.loads(connection.getresponse().read())
        connection.close()
        assert (about["resolution"], about["classes"]) == (8, ["ant", "bee", "cow"])
        assert about["tasks"] == list(module.TASKS)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    finally:
        run.kill()
        _, said = run.communicate()
    assert token not in said
    assert "Traceback" not in said


def test_a_teacher_has_no_studio(cli, teacher):
    cli("studio", "--model", teacher, "--no-browser").error(1, "consistency model")


# The page.


def press(browser, key, code=None):
    for kind in ("keyDown", "keyUp"):
        browser.tell("Input.dispatchKeyEvent", type=kind, key=key, code=code or key, text=" " if key == " " else "")


def choose(browser, name, value):
    browser.ask(f"(() => {{ const one = at('{name}'); one.value = '{value}'; one.onchange && one.onchange(); }})()")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_an_edit_by_hand(cli, studio, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "photo.png")
    with Browser() as browser:
        browser.open(studio.address)
        browser.wait("document.body.dataset.ready === 'yes'")
        assert browser.ask("at('run').disabled") is True
        root = browser.tell("DOM.getDocument")["root"]["nodeId"]
        field = browser.tell("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        browser.tell("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "photo.png")])
        browser.wait("!at('run').disabled")

        # Paint with the pointer, then with the keys.
        browser.ask("at('size').value = 2")
        box = browser.ask("(({x, y, width, height}) => [x, y, width, height])(at('paint').getBoundingClientRect())")

        def at(x, y):
            return {"x": box[0] + box[2] * x / 8, "y": box[1] + box[3] * y / 8, "button": "left"}

        browser.tell("Input.dispatchMouseEvent", type="mousePressed", clickCount=1, buttons=1, **at(2, 2))
        browser.tell("Input.dispatchMouseEvent", type="mouseMoved", buttons=1, **at(5, 2))
        browser.tell("Input.dispatchMouseEvent", type="mouseReleased", clickCount=1, **at(5, 2))
        pixels = "[...at('paint').getContext('2d').getImageData(0, 0, 8, 8).data]"
        painted = f"{pixels}.filter((_, i) => i % 4 === 3).map(a => a > 127 ? 1 : 0)"
        first = np.array(browser.ask(painted)).reshape(8, 8)
        assert first[1:3, 2:5].all()
        assert not first[5:].any()
        browser.ask("at('paint').focus()")
        for key in ["ArrowDown", "ArrowDown", "ArrowRight", " "]:
            press(browser, key)
        second = np.array(browser.ask(painted)).reshape(8, 8)
        assert second.sum() > first.sum()
        assert second[6, 5]
        press(browser, "u")
        assert np.array_equal(np.array(browser.ask(painted)).reshape(8, 8), first)

        choose(browser, "seed", 3)
        choose(browser, "count", 2)
        choose(browser, "steps", 4)
        choose(browser, "label", 1)
        browser.ask("at('run').click()")
        browser.wait("document.querySelectorAll('#results img').length === 2 && !at('run').disabled")
        shown = browser.ask("[...document.querySelectorAll('#results img')].map(one => one.src)")
        command = browser.ask("at('command').textContent")
        image, mask = (browser.ask(f"at('get{name}').href") for name in ("image", "mask"))
        browser.picture(tmp_path / "studio.png")

        choose(browser, "task", "superres")
        assert browser.ask("at('brushes').hidden") is True
        assert browser.ask("at('factors').hidden") is False
        choose(browser, "task", "deblur")
        assert browser.ask("at('blurs').hidden") is False
        choose(browser, "blur", 0.7)
        browser.ask("at('run').click()")
        browser.wait("at('command').textContent.includes('--kernel gaussian:0.7') && !at('run').disabled")
        choose(browser, "task", "stroke")
        browser.ask("at('run').click()")
        browser.wait("at('command').textContent.includes('stroke') && !at('run').disabled")
        browser.resize(360, 740, mobile=True)
        assert browser.ask("document.documentElement.scrollWidth") <= 360
        assert browser.complaints == []
    # The command that is shown does the same, with the files that are offered.
    assert np.array_equal(decoded(image)[..., :3], picture)
    assert np.array_equal(decoded(mask)[..., 0] > 127, first > 0)
    for name, url in (("image.png", image), ("mask.png", mask)):
        (tmp_path / name).write_bytes(base64.b64decode(url.partition(",")[2]))
    words = shlex.split(command)
    assert words[:2] == ["cmtool", "inpaint"]
    here = [str(tmp_path / word) if word in ("image.png", "mask.png") else word for word in words[1:]]
    result = cli(*here[:-1], tmp_path / "made", "--precision", "fp32")  # as the studio of this test computes
    assert result.code == 0, result.stderr
    for line, url in zip(result.lines, shown, strict=True):
        assert np.array_equal(np.asarray(Image.open(line).copy()), decoded(url))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_tells_of_mistakes(studio, picture, tmp_path):
    Image.fromarray(picture[:4, :4]).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with Browser() as browser:
        browser.open(studio.address)
        browser.wait("document.body.dataset.ready === 'yes'")
        root = browser.tell("DOM.getDocument")["root"]["nodeId"]
        field = browser.tell("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        browser.tell("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "broken.png")])
        browser.wait("at('status').className === 'bad'")
        assert "cannot be read as an image" in browser.ask("at('status').textContent")
        browser.tell("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "small.png")])
        browser.wait("!at('run').disabled")
        choose(browser, "task", "stroke")
        browser.ask("at('run').click()")
        browser.wait("at('status').textContent.includes('4x4')")
        time.sleep(0.1)
        assert browser.ask("at('run').disabled") is False
