"""A mask as text."""

from tidar.laboratory.drawn import BLOCK, DOCUMENT, NOTHING, PART, DrawnMask

# before a column at which this begins
COLUMN = {NOTHING: "", BLOCK: " ", DOCUMENT: " │ ", PART: " ┃ "}


def as_text(drawn: DrawnMask) -> str:
    """A line a query, a character a key; parts, documents and blocks are set apart."""
    names = [name for name, length in drawn.parts.items() for _ in range(length)]
    name_width, label_width = (max(map(len, texts)) for texts in (drawn.parts, drawn.labels))
    margin = name_width + label_width + 3
    lines = [drawn.title, "", _header(drawn, margin)]
    for at, (row, begins) in enumerate(zip(drawn.mask.tolist(), drawn.begins)):
        if begins in (DOCUMENT, PART) and at > 0:
            rule = "━" if begins == PART else "─"
            lines.append(" " * margin + "".join(rule * (len(COLUMN[b]) + 1) for b in drawn.begins))
        name = names[at] if begins == PART else ""
        # a block's first query is marked, too
        mark = "╶" if begins == BLOCK else " "
        cells = "".join(COLUMN[b] + "·■"[sees] for b, sees in zip(drawn.begins, row))
        lines.append(f"{name:<{name_width}} {drawn.labels[at]:>{label_width}}{mark} {cells}".rstrip())
    return "\n".join(lines)


def _header(drawn: DrawnMask, margin: int) -> str:
    """Names of the parts, above their first columns."""
    line = " " * margin
    column = margin
    for at, begins in enumerate(drawn.begins):
        column += len(COLUMN[begins])
        if begins == PART:
            name = list(drawn.parts)[sum(b == PART for b in drawn.begins[:at])]
            line = line.ljust(max(column - 2, len(line.rstrip()) + 1)) + f"┃ {name}"
        column += 1
    return line


def as_csv(drawn: DrawnMask) -> str:
    """A line a query, 0 or 1 a key, separated by commas."""
    return "\n".join(",".join(map(str, row)) for row in drawn.mask.int().tolist())
