"""Official editing rows: `image_list` (N >= 2 encoded pictures) and `instruction_list` (N-1 lists of alternatives).

Instruction i turns picture i into picture i+1. Each visit draws a chain of one or two edits from it.
"""

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format


def entries(row: dict, context: Context) -> list[Entry]:
    images, instructions = row.get("image_list") or [], row.get("instruction_list") or []
    _check(images, instructions)
    draw = context.generator("edit_chain")
    start = int(draw.integers(0, len(images) - 1))
    end = int(draw.integers(start + 1, min(start + 2, len(images) - 1) + 1))
    join = bool(draw.random() < 0.5) and end - start > 1
    steps = [instructions[i][int(draw.integers(0, len(instructions[i])))] for i in range(start, end)]

    chain = [Entry(image=context.image(images[start], start))]
    if join:
        return [*chain, Entry(text=" ".join(f"{step}." for step in steps)), _made(images, end, context)]
    for i, step in enumerate(steps, start + 1):
        chain += [Entry(text=step), _made(images, i, context)]
    return chain


def _made(images: list, i: int, context: Context) -> Entry:
    return Entry(image=context.image(images[i], i), loss=True)


def _check(images: object, instructions: object) -> None:
    if not isinstance(images, list) or not isinstance(instructions, list):
        raise DataFault("bad_row", "image_list and instruction_list must be lists")
    if len(images) < 2:
        raise DataFault("bad_row", f"image_list has {len(images)} pictures; an edit needs at least 2")
    if not all(step is None or isinstance(step, list) for step in instructions):
        raise DataFault("bad_row", "instruction_list must hold one list of alternative instructions for each step")
    if len(instructions) != len(images) - 1 or not all(instructions):
        raise DataFault(
            "bad_row",
            f"instruction_list must hold {len(images) - 1} non-empty lists for {len(images)} pictures, "
            f"found {len([step for step in instructions if step])}",
        )
    if any(image is None for image in images) or any(text is None for step in instructions for text in step):
        raise DataFault("bad_row", "image_list or instruction_list holds a null")


FORMAT = Format(entries, required=["image_list", "instruction_list"])
