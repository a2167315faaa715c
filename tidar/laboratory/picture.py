"""A mask as a PNG picture."""

from pathlib import Path

from tidar.config import UserError
from tidar.config.packages import install
from tidar.laboratory.row_mask import BLOCK, DOCUMENT, PART, RowMask

# pixels: smallest side of the mask, largest cell, left and top margin
SIDE, LARGEST_CELL, MARGIN, TOP = 400, 24, 88, 64
# largest number of positions, one pixel each
MOST = 2048
PAPER, INK, UNSEEN = (255, 255, 255), (40, 44, 52), (236, 238, 242)
# colors of allowed pairs whose query is a token, or the mask token
OF_TOKEN, OF_MASK = (46, 98, 170), (222, 120, 48)
LINES = {BLOCK: (255, 255, 255), DOCUMENT: (120, 124, 132), PART: INK}


def check_size(positions: int) -> None:
    """Raises UserError for more model positions than a picture has room for."""
    if positions > MOST:
        raise UserError(f"masks plot: {positions} model positions: must be at most {MOST}")


def save_picture(row_mask: RowMask, path: Path) -> None:
    """Writes the mask to `path`: queries from top to bottom, keys from left to right. Allowed pairs are blue, or orange
    where the input of the query is the mask token.

    Lines separate parts, documents and, where cells have at least 4 pixels, blocks. Parts and documents are named.
    Raises UserError where Pillow is missing, the mask has too many positions or the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UserError(f"masks plot: needs Pillow: {install('plot')}") from None
    positions = len(row_mask.mask)
    check_size(positions)
    cell = min(LARGEST_CELL, -(-SIDE // positions))
    side = positions * cell
    title, small = ImageFont.load_default(14), ImageFont.load_default(11)
    size = max(MARGIN + side, 8 + round(title.getlength(row_mask.title))) + 16, TOP + side + 16
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)

    cells = Image.new("P", (positions, positions))
    cells.putpalette([channel for color in (UNSEEN, OF_TOKEN, OF_MASK) for channel in color])
    kinds = [2 if label.startswith("M") else 1 for label in row_mask.labels]
    cells.putdata([sees * kind for kind, row in zip(kinds, row_mask.mask.int().tolist()) for sees in row])
    image.paste(cells.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (MARGIN, TOP))

    for kind in (BLOCK, DOCUMENT, PART):
        if kind == BLOCK and cell < 4:
            continue
        for at, begins in enumerate([*row_mask.begins, PART]):
            if begins == kind:
                at *= cell
                width = 2 if kind == PART else 1
                draw.line((MARGIN + at, TOP, MARGIN + at, TOP + side), LINES[kind], width)
                draw.line((MARGIN, TOP + at, MARGIN + side, TOP + at), LINES[kind], width)

    draw.text((8, 6), row_mask.title, INK, title)
    for name, start, end, kind in _captions(row_mask):
        middle = (start + end) * cell // 2
        across, along = (small, TOP - 18) if kind == DOCUMENT else (title, TOP - 36)
        if draw.textlength(name, across) <= (end - start) * cell + 4:
            draw.text((MARGIN + middle, along), name, INK, across, anchor="ma")
        if kind == PART or (end - start) * cell >= 12:
            left = MARGIN - 6 if kind == DOCUMENT else MARGIN - 40
            draw.text((left, TOP + middle), name, INK, across, anchor="rm")
    try:
        image.quantize(16, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None


def _captions(row_mask: RowMask) -> list[tuple[str, int, int, int]]:
    """(name, first position, position after the last, kind) of parts, and of documents where there are several."""
    starts = [at for at, begins in enumerate(row_mask.begins) if begins in (DOCUMENT, PART)] + [len(row_mask.mask)]
    parts = [at for at, begins in enumerate(row_mask.begins) if begins == PART] + [len(row_mask.mask)]
    found = [(name, first, end, PART) for name, first, end in zip(row_mask.parts, parts, parts[1:])]
    if len(starts) > len(parts):
        number = 0
        for first, end in zip(starts, starts[1:]):
            number = 1 if row_mask.begins[first] == PART else number + 1
            found.append((f"doc {number}", first, end, DOCUMENT))
    return found
