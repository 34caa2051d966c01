"""`cmtool stroke`: a picture that follows rough strokes."""

from __future__ import annotations

from cmtool.cli import console, images, options


def stroke(
    *,
    model: options.Model = None,
    image: options.Image,
    out: options.Out,
    seeds: options.Seeds = "0",
    labels: options.Labels = None,
    times: options.Times = None,
    compare: options.Compare = None,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Make a picture out of rough strokes: their layout and colours stay, the details are new.

    The first of the --times says how much: the more noise, the freer the picture. By default the two times of Song et
    al. (2023), scaled from 256 pixels to the size of the model.
    """
    wanted = options.parse_seeds(seeds)
    images.one_result(as_json, out, compare)
    targets = images.places(out, wanted)
    if compare is not None:
        images.check_target("--compare", compare)

    import torch

    from cmtool import starts
    from cmtool.generate import Generated, check_images, in_batches, labels_for
    from cmtool.io.images import captioned_rows, from_uint8, read_image, write_image

    model = images.chosen(model)
    imported = images.read_model(model, role="consistency")
    known = read_image(image, imported.card.channels)
    flow = images.ready(imported, device=device, precision=precision)
    given = check_images(from_uint8(known), flow)
    chosen = images.labels(flow, labels)
    points = None if times is None else options.parse_times(times)

    def make(at: slice) -> Generated:
        part = wanted[at]
        made = starts.stroke(flow, given, seeds=part, labels=chosen, times=points, batch=len(part))
        return Generated(part, labels_for(flow, part, chosen), made, 0)

    made = in_batches(flow, len(wanted), make, batch=batch)
    on_stdout = not as_json and compare != "-"
    saved = list(images.save("stroke", made, wanted, targets, on_stdout=on_stdout))
    if compare is not None:
        rows = [("strokes", known[None]), ("answers", torch.stack([answer for _, answer in saved]))]
        write_image(compare, captioned_rows(rows, columns=min(8, len(wanted)), scale=max(1, 96 // known.shape[-1])))
    if as_json:
        used = starts.stroke_times(flow).tolist() if points is None else points
        console.emit_json({"images": [entry for entry, _ in saved], "times": used, "image": image, "model": model})
