"""The spatial schema: what stands in the text where an image was.

Layout "slices": slices in reading order, each followed by its separator (a comma inside a row, a
newline at its end), then the overview. Layout "rows": the token maps of the slices joined into one
map, a newline after each of its rows, one more separator, then the overview.

Separators are ordinary vocabulary tokens, so the whole layout is part of ``input_ids`` and the
model only overwrites the placeholders.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from llava_uhd.config.model import ImageConfig
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import SlicePlan, map_side


def single_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of the one token that ``text`` adds behind a word.

    Llama vocabularies: 29892 for a comma and 13 (the byte token) for a newline, as published.

    Raises:
        UserError: the tokenizer does not write ``text`` as one token.
    """
    stem = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a" + text, add_special_tokens=False)["input_ids"]
    if whole[:-1] != stem:
        raise UserError(
            f"the tokenizer writes {text!r} as {whole[len(stem) :]}, not as one token of its own: "
            "set image.comma_id and image.newline_id to the separators to use"
        )
    return int(whole[-1])


def image_ids(plan: SlicePlan, counts: list[int], config: ImageConfig) -> list[int]:
    """Token ids that stand for one image.

    Args:
        plan: of the image.
        counts: tokens of each view, slices first, the overview last.
        config: placeholder and separator ids.

    Returns:
        Example: a 2 x 1 grid of 144-token views gives 144 placeholders, a comma, 144 placeholders,
        a newline, 144 placeholders: 434 ids. In the layout "rows": 12 times 24 placeholders and a
        newline, a comma, 144 placeholders: 445 ids.

    Raises:
        UserError: the layout is "rows" and the views have no square number of tokens.
    """
    placeholder, comma, newline = config.image_token_id, config.comma_id, config.newline_id
    if placeholder is None or comma is None or newline is None:
        raise ValueError("image.image_token_id, comma_id and newline_id must be set")
    columns, rows = plan.grid or (1, 0)
    if config.layout == "rows":
        side = map_side(counts)
        joined = ([placeholder] * (columns * side) + [newline]) * (rows * side)
        # As published, the overview is divided off by the separator that a first slice would have.
        divider = [newline if columns == 1 else comma] if rows else []
        return joined + divider + [placeholder] * counts[-1]
    ids: list[int] = []
    for index, count in enumerate(counts):
        ids += [placeholder] * count
        if index < plan.num_slices:
            ids.append(newline if (index + 1) % columns == 0 else comma)
    return ids
