"""python docs/picture.py RUN_DIR [OUT]: the README's picture,
eight captions of a demo run before and after LPO.

RUN_DIR is what `make demo` writes (runs/demo/lpo). Pixels are enlarged without smoothing. Every third caption
is taken, so that all shapes come up; none is chosen. "correct" below a picture: it shows what its caption
asks for, as measured from its pixels.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, EVERY, SCALE, SIDE, GAP, MARGIN, LABEL = 8, 3, 3, 32, 22, 54, 50
INK, LINE = {True: (20, 110, 50), False: (190, 40, 30), None: (50, 50, 50)}, (150, 150, 150)


def compose(run: Path) -> Image.Image:
    """Two rows of pictures under their captions."""
    folder, cell = run / "pictures", SIDE * SCALE
    captions = json.loads((folder / "captions.json").read_text())[:COLUMNS * EVERY:EVERY]
    font = ImageFont.load_default(12)
    page = Image.new("RGB", (MARGIN + len(captions) * (cell + GAP) - GAP // 2, LABEL + 2 * (cell + GAP)),
                     "white")
    draw = ImageDraw.Draw(page)
    for row, stage in enumerate(("before", "after")):
        top = LABEL + row * (cell + GAP)
        draw.text((4, top + cell / 2), stage, INK[None], font, anchor="lm")
        for column, about in enumerate(captions):
            left = MARGIN + column * (cell + GAP)
            if not row:
                draw.multiline_text((left + cell / 2, LABEL - 6), wrapped(about["caption"]), INK[None], font,
                                    anchor="md", align="center", spacing=2)
            picture = Image.open(folder / f"{column * EVERY:03d}_{stage}.png").resize(
                (cell, cell), Image.Resampling.NEAREST)
            page.paste(picture, (left, top))
            draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=LINE)
            correct = next(value for key, value in about.items() if key.startswith(f"{stage}_"))
            draw.text((left + cell / 2, top + cell + 3), "correct" if correct else "wrong", INK[correct],
                      font, anchor="mt")
    return page


def wrapped(caption: str) -> str:
    """A caption in lines that fit over its picture: "a red circle", "on a blue", "background"."""
    what, _, ground = caption.partition(" on ")
    return f"{what}\non {ground}".replace(" background", "\nbackground")


if __name__ == "__main__":
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("before_after.png")
    compose(Path(sys.argv[1])).save(out, optimize=True)
    print(out, out.stat().st_size, "bytes")
