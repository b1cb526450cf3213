"""What will be trained on, before training: rows as text, and as input -> target, position by position.

Everything shown went through the loader and `align`: it is the batch itself that is decoded, not the documents
it came from. So a shift, a missing EOS or a document border in the wrong place can be seen here.
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from minilm.alignment import Batch
from minilm.data.rows import RowPlace
from minilm.data.tokenizer import Tokenizer

_COLOURS = ("cyan", "yellow", "green", "magenta")  # of the documents of a row, in turn
_CONTEXT = "dim"
_WIDEST_TOKEN = 12  # characters; so that the table fits into 80 columns


def row_text(batch: Batch, row: int, tokenizer: Tokenizer | None) -> Text:
    """A row as text: ┃ where a document begins, special tokens by name, dim what is not a target.

    Shown are the first input of each document (context only) and every target that counts. Without colours
    context is in [brackets]. Targets that can be known from an entry of a knowledge source stand in ‹ ›, with its row.
    """
    inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
    segments, weights = batch.segments[row].tolist(), batch.weights[row].tolist()
    entries = [-1] * len(inputs) if batch.entries is None else batch.entries[row].tolist()
    text, pending, style, entry = Text(), [], _CONTEXT, -1

    def flush() -> None:
        decoded = _decoded(pending, tokenizer)
        text.append(f"‹{decoded} ={entry}›" if entry >= 0 and pending else decoded, style=style)
        pending.clear()

    for i, segment in enumerate(segments):
        if segment == 0:
            continue
        if i == 0 or segments[i - 1] != segment:
            flush()
            text.append("┃", style="bold red")
            text.append(f"[{_decoded([inputs[i]], tokenizer)}]", style=_CONTEXT)
        wanted = _COLOURS[segment % len(_COLOURS)] if weights[i] else _CONTEXT
        if (wanted, entries[i]) != (style, entry):
            flush()
            style, entry = wanted, entries[i]
        if weights[i]:
            pending.append(targets[i])
    flush()
    padding = segments.count(0)
    if padding:
        text.append(f"  + {padding} positions of padding", style=_CONTEXT)
    return text


def row_table(batch: Batch, row: int, tokenizer: Tokenizer | None, num_positions: int) -> Table:
    """The first positions of a row: what the model is given there, what it must predict, does it count, the number
    of the document in the row, the place in that document, and the entry from which the target can be known."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("position", "right"), ("input", "left"), ("", "left"), ("target", "left"),
        ("weight", "right"), ("segment", "right"), ("place", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)
    if batch.entries is not None:
        table.add_column("entry", justify="right", no_wrap=True)
    for i in range(min(num_positions, batch.inputs.shape[1])):
        counts = bool(batch.weights[row, i])
        segment = int(batch.segments[row, i])
        entry = -1 if batch.entries is None else int(batch.entries[row, i])
        table.add_row(
            str(i),
            Text(_token(int(batch.inputs[row, i]), tokenizer)),  # not str: a text may look like rich's markup
            "->" if counts else "",
            Text(_token(int(batch.targets[row, i]), tokenizer)),
            f"{float(batch.weights[row, i]):g}",
            str(segment) if segment else "padding",
            str(int(batch.positions[row, i])),
            *([] if batch.entries is None else [str(entry) if entry >= 0 else ""]),
            style=_COLOURS[segment % len(_COLOURS)] if counts else _CONTEXT,
        )
    return table


def show(
    console: Console,
    title: str,
    batches: list[Batch],
    places: list[RowPlace],
    tokenizer: Tokenizer | None,
    *,
    num_rows: int,
    num_positions: int,
) -> None:
    """Print rows of some micro-batches with where each comes from. `places`: of all their rows, in order."""
    console.print(Text(title, style="bold"))
    flat = [(batch, row) for batch in batches for row in range(batch.shape[0])]
    for (batch, row), place in list(zip(flat, places, strict=True))[:num_rows]:
        targets = int(batch.weights[row].sum())
        parts: list[RenderableType] = [
            Rule(Text(f"{place} · {targets} targets"), align="left", characters="-")
        ]
        parts.append(row_text(batch, row, tokenizer))
        if num_positions:
            parts += [Text(), row_table(batch, row, tokenizer, num_positions)]
        console.print(Group(*parts), soft_wrap=False)
    left = len(flat) - num_rows
    if left > 0:
        console.print(Text(f"... and {left} more rows in this batch", style=_CONTEXT))


def _decoded(ids: list[int], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + (" " if ids else "")
    return tokenizer.decode(ids, special=True)


def _token(token: int, tokenizer: Tokenizer | None) -> str:
    """`  412 ' the'`; a token that is a part of a character is shown as its bytes."""
    if tokenizer is None:
        return f"{token:>6}"
    if token in tokenizer.special_ids:
        return f"{token:>6} {tokenizer.token_name(token)}"
    text = tokenizer.decode([token])
    if "\ufffd" in text:
        text = tokenizer.token_name(token)
    shown = repr(text)
    return f"{token:>6} {shown if len(shown) <= _WIDEST_TOKEN else shown[: _WIDEST_TOKEN - 1] + '…'}"
