"""One-step samples over HTTP: http://127.0.0.1:8000/7.png is the picture of seed 7, /7.png?class=3 that of a class.

    python examples/cookbook/serve.py --model digits-small --port 8000

The standard library's server and cmtool's Python functions; a picture of a seed is always the same.
"""

from __future__ import annotations

import argparse
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs, urlsplit

import cmtool
from cmtool.errors import UserError
from cmtool.io.images import png_bytes, to_uint8


class Handler(BaseHTTPRequestHandler):
    model: cmtool.FlowMap
    lock = Lock()  # one picture at a time: each uses all cores

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        found = re.fullmatch(r"/(\d{1,18})\.png", asked.path)
        if found is None:
            self.send_error(404, "ask for /SEED.png")
            return
        try:
            label = parse_qs(asked.query).get("class")
            with self.lock:
                images = cmtool.sample(
                    self.model, seeds=[int(found[1])], labels=int(label[0]) if label else None, steps=1
                )
        except (UserError, ValueError) as error:
            self.send_error(400, str(error).splitlines()[0])
            return
        data = png_bytes(to_uint8(images)[0])
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "max-age=31536000, immutable")
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10-small")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    Handler.model = cmtool.load(options.model, role="consistency")
    with ThreadingHTTPServer(("127.0.0.1", options.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/0.png", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
