"""Multi-step editing: `input_image` and `editing_steps` [{instruction, result_image}].

Every result is generated and then shown to the next step; `loss` of a step says otherwise.
"""

from megabagel.data.document import Entry
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format


def entries(row: dict, context: Context) -> list[Entry]:
    found = [Entry(image=context.image(row.get("input_image")))]
    for where, step in fields.objects(row, "editing_steps"):
        found.append(Entry(text=fields.text(step, "instruction", where)))
        loss = fields.switch(step, "loss", where, default=True)
        found.append(Entry(image=context.image(step.get("result_image")), loss=loss))
    return fields.learnt(found)


FORMAT = Format(entries, required=["input_image", "editing_steps"])
