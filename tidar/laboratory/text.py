"""A mask as text."""

from tidar.laboratory.row_mask import BLOCK, DOCUMENT, NOTHING, PART, RowMask

# separator before a column at which this begins
COLUMN = {NOTHING: "", BLOCK: " ", DOCUMENT: " │ ", PART: " ┃ "}


def as_text(row_mask: RowMask) -> str:
    """One line per query, one character per key; parts, documents and blocks are separated."""
    names = [name for name, length in row_mask.parts.items() for _ in range(length)]
    name_width, label_width = (max(map(len, texts)) for texts in (row_mask.parts, row_mask.labels))
    margin = name_width + label_width + 3
    lines = [row_mask.title, "", _header(row_mask, margin)]
    for at, (row, begins) in enumerate(zip(row_mask.mask.tolist(), row_mask.begins)):
        if begins in (DOCUMENT, PART) and at > 0:
            rule = "━" if begins == PART else "─"
            lines.append(" " * margin + "".join(rule * (len(COLUMN[b]) + 1) for b in row_mask.begins))
        name = names[at] if begins == PART else ""
        # marks the first query of a block
        mark = "╶" if begins == BLOCK else " "
        cells = "".join(COLUMN[b] + "·■"[sees] for b, sees in zip(row_mask.begins, row))
        lines.append(f"{name:<{name_width}} {row_mask.labels[at]:>{label_width}}{mark} {cells}".rstrip())
    return "\n".join(lines)


def _header(row_mask: RowMask, margin: int) -> str:
    """Names of the parts above their first columns."""
    line = " " * margin
    column = margin
    for at, begins in enumerate(row_mask.begins):
        column += len(COLUMN[begins])
        if begins == PART:
            name = list(row_mask.parts)[sum(b == PART for b in row_mask.begins[:at])]
            line = line.ljust(max(column - 2, len(line.rstrip()) + 1)) + f"┃ {name}"
        column += 1
    return line


def as_csv(row_mask: RowMask) -> str:
    """One line per query, 0 or 1 per key, separated by commas."""
    return "\n".join(",".join(map(str, row)) for row in row_mask.mask.int().tolist())
