"""Read for Jupyter notebooks (nbformat 4): the cells and their outputs."""

from __future__ import annotations

import os
from typing import Any
from zlib import crc32

import orjson

from gateway.errors import TooLarge
from gateway.rootfs.paths import show
from gateway.rootfs.root import etag, read_all
from gateway.tools.answer import Answer, Seen, ToolFailure
from gateway.tools.call import Call, failure

OUTPUTS_MAX = 10_000  # characters of the outputs of one notebook cell, as in Claude Code
_NOTHING = "(Read completed with no output)"


def notebook(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
    """Answer with the cells of a Jupyter notebook (nbformat 4) and their outputs."""
    if status.st_size > call.limits.write_max:
        raise failure("Read", TooLarge("the notebook is too large", size=status.st_size))
    data = read_all(descriptor, status.st_size, call.limits.write_max)
    try:
        notebook = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        words = (
            "Notebook file is not valid JSON (it may be truncated, corrupted, or still being written): "
            f"JSON Parse error: {error.msg}"
        )
        raise ToolFailure("binary_file", words, tagged=False) from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(map(_is_cell, cells)):
        words = (
            'Notebook file is not a valid Jupyter notebook (top-level "cells" must be an array of cell '
            'objects, each with a string or string-array "source").'
        )
        raise ToolFailure("binary_file", words, tagged=False)
    blocks = _blocks(cells, _language(notebook))
    size = sum(len(block.get("text", block.get("data", ""))) for block in blocks)
    if size > call.limits.result_max:
        raise failure("Read", TooLarge("the notebook's cells are too large", size=size))
    facts = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status), "cells": len(cells)}
    return Answer(blocks, facts, seen=Seen(etag(status), crc32(data), True))


def _is_cell(cell: object) -> bool:
    source = cell.get("source") if isinstance(cell, dict) else None
    return isinstance(source, str) or (
        isinstance(source, list) and all(isinstance(one, str) for one in source)
    )


def _language(notebook: dict[str, Any]) -> str:
    found: Any = notebook
    for key in ("metadata", "language_info", "name"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else "python"


def _blocks(cells: list[dict[str, Any]], language: str) -> list[dict[str, Any]]:
    """Return one block for each run of texts and one for each image, in order."""
    blocks: list[dict[str, Any]] = []

    def add(words: str) -> None:
        if blocks and blocks[-1]["type"] == "text":
            blocks[-1]["text"] += "\n" + words
        else:
            blocks.append({"type": "text", "text": words})

    for index, cell in enumerate(cells):
        kind = cell.get("cell_type", "code")
        name = show(str(cell.get("id", f"cell-{index}")))
        tags = ""
        if kind != "code":
            tags += f"<cell_type>{show(str(kind))}</cell_type>"
        elif language != "python":
            tags += f"<language>{show(str(language))}</language>"
        add(f'<cell id="{name}">{tags}{_joined(cell.get("source", ""))}</cell id="{name}">')
        outputs = cell.get("outputs") if kind == "code" else None
        shown = [one for output in outputs for one in _output(output)] if isinstance(outputs, list) else []
        if sum(len(one) for one in shown if isinstance(one, str)) > OUTPUTS_MAX:
            shown = [
                "Outputs are too large to include. Use Bash with: cat <notebook_path> | "
                f"jq '.cells[{index}].outputs'"
            ]
        for one in shown:
            if isinstance(one, str):
                add("\n" + one)
            else:
                blocks.append(one)
    return blocks or [{"type": "text", "text": _NOTHING}]


def _output(output: object) -> list[str | dict[str, Any]]:
    """Return one output of a cell: texts, and images as blocks."""
    if not isinstance(output, dict):
        return []
    match output.get("output_type"):
        case "stream":
            words = _joined(output.get("text", ""))
            return [words] if words else []
        case "error":
            trace = output.get("traceback")
            lines = "\n".join(map(str, trace)) if isinstance(trace, list) else ""
            return [f"{output.get('ename', '')}: {output.get('evalue', '')}\n{lines}"]
        case "execute_result" | "display_data":
            data = output.get("data")
            shown: dict[str, Any] = data if isinstance(data, dict) else {}
            found: list[str | dict[str, Any]] = (
                [_joined(shown["text/plain"])] if "text/plain" in shown else []
            )
            for mime in ("image/png", "image/jpeg"):
                if mime in shown:
                    image = "".join(_joined(shown[mime]).split())
                    found.append({"type": "image", "data": image, "mimeType": mime})
            return found
        case _:
            return []


def _joined(value: object) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)
