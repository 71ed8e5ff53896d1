"""Small pictures with drawn objects and exact labels, in COCO's format, for tests of heads."""

import json

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square")
COLOURS = ((20, 40, 220), (230, 30, 30))


def draw_split(root, name, *, count, seed=0):
    """Write `count` JPEG files of 96 x 64 or 64 x 96 pixels, one or two objects each."""
    rng = np.random.default_rng(seed)
    folder = root / name
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, objects = [], []
    for index in range(count):
        width, height = (96, 64) if index % 2 else (64, 96)
        grey = rng.integers(90, 140, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(grey)
        pen = ImageDraw.Draw(picture)
        for place in range(1 + index % 2):
            kind, side = int(rng.integers(2)), int(rng.integers(16, 31))
            x = int(rng.integers(place * width // 2, (place + 1) * width // (1 + index % 2) - side))
            y = int(rng.integers(height - side))
            box = [x, y, x + side - 1, y + side - 1]
            (pen.rectangle if kind else pen.ellipse)(box, fill=COLOURS[kind])
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            objects.append(
                {
                    "id": len(objects) + 1, "image_id": 10 * index, "category_id": kind + 3,
                    "bbox": [x, y, side, side], "area": side * side, "iscrowd": 0,
                    "segmentation": [corners],
                }
            )  # fmt: skip
        picture.save(folder / f"{index}.jpg", quality=95)
        images.append(
            {"id": 10 * index, "file_name": f"{index}.jpg", "width": width, "height": height}
        )
    categories = [{"id": number + 3, "name": name} for number, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return folder
