"""How much noise `cmtool stroke` should add: pictures between what was painted and what is real.

    python examples/strokes.py --data CIFAR_TEST_FOLDER --features judge.pt2 --out strokes

Test images are made into strokes, as Meng et al. (2021) simulate them: the median of the surroundings, and six colours.
For each amount of noise (noise-to-signal of the first of the two times; the second is in the published proportion to
it): how far the coarse colours (means over 4x4 pixels) are from the strokes', in dB of PSNR, and the Fréchet distance
to the true images in the features of a classifier (`examples/cifar_judge.py`). Much noise forgets the strokes, little
leaves them as they are. Results are kept in --out: results.jsonl, table.md and a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

import cmtool
from cmtool import precision
from cmtool.editing import AvgPool
from cmtool.evaluation.features import Exported
from cmtool.evaluation.similarity import psnr
from cmtool.evaluation.statistics import frechet, statistics
from cmtool.io.data import open_data
from cmtool.io.extractors import read_extractor
from cmtool.io.images import captioned_rows, from_uint8, to_uint8, write_image
from cmtool.starts import STROKE, stroke, stroke_times

LEVELS = (0.084, 0.168, 0.336, 0.4755, 0.6725, 0.951, 1.345, 2.69, 5.38)  # the last is that for 256 pixels


def strokes(images: Tensor, colours: int = 6) -> Tensor:
    """Images uint8 [B, 3, H, W] as somebody might paint them."""
    size = 2 * max(1, round(23 / 256 * images.shape[-1] / 2)) + 1  # 23 at 256 pixels
    found = []
    for image in images:
        painted = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.MedianFilter(size))
        found.append(np.asarray(painted.quantize(colours, dither=Image.Dither.NONE).convert("RGB")))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10-small")
    parser.add_argument("--data", required=True, help="images the model has not seen, a folder a class")
    parser.add_argument("--features", required=True, type=Path, help="a classifier's, exported")
    parser.add_argument("--out", type=Path, default=Path("strokes"))
    parser.add_argument("-n", type=int, default=2000, help="images, evenly spread over the data")
    options = parser.parse_args()
    place = precision.device("auto")
    model = cmtool.load(options.model, role="consistency", device=place)
    model = model.compute_in(precision.compute_dtype("auto", place))
    data = open_data(options.data, resolution=model.card.resolution)
    truth, labels = data.batch(torch.linspace(0, len(data) - 1, min(options.n, len(data))).round().long())
    painted = strokes(truth)
    judge = Exported(*read_extractor(options.features, place), options.features.stem, place)
    real, coarse = statistics(judge(truth).vectors), AvgPool(4)

    def measured(images: Tensor) -> dict[str, float]:
        near = psnr(to_uint8(coarse.A(from_uint8(images))), to_uint8(coarse.A(from_uint8(painted))))
        return {"psnr": float(near.clamp(max=60).mean()), "fd": frechet(statistics(judge(images).vectors), real)}

    found = [{"noise": 0.0, **measured(painted)}]
    shown = [("truth", truth[:12]), ("strokes", painted[:12])]
    usual = float(model.path.ratio(stroke_times(model))[0])
    for level in LEVELS:
        ratios = torch.tensor([level, level * STROKE[1] / STROKE[0]], dtype=torch.float64)
        answers = stroke(
            model,
            from_uint8(painted),
            seeds=range(len(painted)),
            labels=None if labels is None else labels.tolist(),
            times=model.path.time(ratios).float(),
        )
        found.append({"noise": level, **measured(to_uint8(answers))})
        print(json.dumps(found[-1]), flush=True)
        shown.append((f"{level:.3g}" + (", the default" if abs(level - usual) < 1e-3 else ""), to_uint8(answers[:12])))
    options.out.mkdir(parents=True, exist_ok=True)
    write_image(str(options.out / "strokes.png"), captioned_rows(shown, columns=12, scale=3))
    lines = ["| noise | coarse PSNR to the strokes | fd_judge to real images |", "|---|---|---|"]
    lines += [f"| {row['noise']:.3g} | {row['psnr']:.1f} | {row['fd']:.2f} |" for row in found]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    (options.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
