"""Build `eval/assets/scenes.npz`, the real content of the procedural scenes; see `eval/assets/LICENSES.md`.

    python -m training.make_assets

Needs scikit-learn, scikit-image and matplotlib, from whose wheels the content is taken; nothing is downloaded.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from vtc.eval import content

OUT = Path(__file__).parents[1] / "eval" / "assets" / "scenes.npz"
TYPEFACES = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
PHOTOS = {  # all CC0 or released into the public domain by their authors
    "train": ("brick", "camera", "coffee", "grass", "rocket"),
    "val": ("clock",),
    "test": ("chelsea", "gravel"),
}
PHOTO_SIDE = 224  # pixels of the shorter side


def digits() -> dict[str, np.ndarray]:
    """1797 images (8, 8) with values 0-16, shuffled once and for all so that slices of it can be splits."""
    data = load_digits()
    order = np.random.RandomState(7).permutation(len(data.images))
    return {"digits": data.images[order].astype(np.uint8), "digit_labels": data.target[order].astype(np.uint8)}


def word_mask(word: str, typeface: str, size: int) -> np.ndarray:
    """Opacity (h, w) uint8 of a word with one pixel of margin."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{typeface}.ttf"
    font = ImageFont.truetype(str(path), size)
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(image).text((1 - left, 1 - top), word, font=font, fill=255)
    return np.asarray(image)


def words() -> dict[str, np.ndarray]:
    masks = [word_mask(w, t, s) for w in content.WORDS for t in TYPEFACES for s in content.WORD_SIZES]
    shapes = np.array([mask.shape for mask in masks], np.uint8)
    return {
        "word_pixels": np.concatenate([mask.ravel() for mask in masks]),
        "word_shapes": shapes.reshape(len(content.WORDS), len(TYPEFACES), len(content.WORD_SIZES), 2),
    }


def photos() -> dict[str, np.ndarray]:
    """Scaled-down photographs as the bytes of JPEG files."""
    out = {}
    for split, names in PHOTOS.items():
        for name in names:
            photo = Image.fromarray(getattr(skimage.data, name)())
            scale = PHOTO_SIDE / min(photo.size)
            photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.LANCZOS)
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=88, subsampling=0)
            out[f"photo_{split}_{name}"] = np.frombuffer(buffer.getvalue(), np.uint8)
    return out


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **digits(), **words(), **photos())
    print(f"{OUT}: {OUT.stat().st_size / 1024:.0f} KB")
