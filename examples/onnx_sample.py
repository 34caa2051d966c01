"""Images from an ONNX file, without torch: onnxruntime and numpy are all that deployment needs.

    cmtool convert runs/student student.onnx
    python examples/onnx_sample.py student.onnx --times 80,0.8 --count 16 --out onnx.png

The file holds f(x, t), the image behind x at time t. One step is f of pure noise; more steps put some noise back and
ask again (Song et al. 2023, arXiv:2303.01469, algorithm 1). Works for models on the variance-exploding path, which all
released ones and the presets cd, ct, ict and ect are.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=1, help="how many of the times in the file: 1 is the first only")
    parser.add_argument("--times", help="the times instead, for example 80,0.8: one call each")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="onnx.png")
    given = parser.parse_args()

    session = onnxruntime.InferenceSession(given.model, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    path = json.loads(told["cmtool.path"])
    if path["kind"] != "ve":
        parser.error(f"the model lives on the path {path['kind']}; this script only knows ve")
    if told["cmtool.role"] == "denoiser":
        parser.error("the file holds a denoiser: one call of it makes a mean, not an image")
    if given.times:
        times = [float(time) for time in given.times.split(",")]
    else:
        times = [path["t_max"]] if given.steps == 1 else json.loads(told["cmtool.times"]).get(str(given.steps))
    if times is None:
        parser.error(f"the file recommends no times for {given.steps} steps; name them with --times")

    inputs = {entry.name: entry for entry in session.get_inputs()}
    shape = (given.count, *inputs["x"].shape[1:])
    generator = np.random.default_rng(given.seed)
    feed = {"x": times[0] * generator.standard_normal(shape, dtype=np.float32)}
    if "labels" in inputs:
        feed["labels"] = np.arange(given.count, dtype=np.int64) % int(told["cmtool.num_classes"])
    for t, after in zip(times, [*times[1:], None], strict=True):
        (image,) = session.run(["image"], feed | {"t": np.full(given.count, t, np.float32)})
        image = np.clip(image, -1, 1)
        if after is not None:
            spread = (after**2 - path["t_min"] ** 2) ** 0.5
            feed["x"] = image + np.float32(spread) * generator.standard_normal(shape, dtype=np.float32)

    pixels = np.round((image.transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    side = int(np.ceil(np.sqrt(given.count)))
    grid = np.zeros((side * shape[2], side * shape[3], shape[1]), np.uint8)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, side)
        grid[row * shape[2] : (row + 1) * shape[2], column * shape[3] : (column + 1) * shape[3]] = picture
    Image.fromarray(grid.squeeze()).save(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
