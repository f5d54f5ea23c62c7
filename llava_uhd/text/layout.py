"""The spatial schema: what stands in the text where an image was.

Layout "slices": slices in reading order, each followed by its separator (a comma inside a row, a
newline at its end), then the overview. Layout "rows": the token maps of the slices joined into one
map, a newline after each of its rows, one more separator, then the overview. In the other layouts
nothing but placeholders stands for an image.

Separators are ordinary vocabulary tokens, so the whole layout is part of ``input_ids`` and the
model only overwrites the placeholders.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llava_uhd.config.model import ImageConfig
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import SlicePlan
from llava_uhd.images.maps import TokenMap


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


def image_ids(plan: SlicePlan, maps: Sequence[TokenMap], config: ImageConfig) -> list[int]:
    """Token ids that stand for one image.

    Args:
        plan: of the image.
        maps: of the image, from `llava_uhd.images.maps.image_maps`.
        config: placeholder and separator ids.

    Returns:
        Example: a 2 x 1 grid of 144-token views gives 144 placeholders, a comma, 144 placeholders,
        a newline, 144 placeholders: 434 ids. In the layout "rows": 12 times 24 placeholders and a
        newline, a comma, 144 placeholders: 445 ids.
    """
    placeholder, comma, newline = config.image_token_id, config.comma_id, config.newline_id
    if placeholder is None or comma is None or newline is None:
        raise ValueError("image.image_token_id, comma_id and newline_id must be set")
    columns = plan.grid[0] if plan.grid else 1
    if config.layout == "rows" and plan.grid is not None:
        slices, overview = reversed(maps) if plan.overview_first else maps
        joined = ([placeholder] * slices.out_width + [newline]) * slices.out_height
        # As published, the overview is divided off by the separator that a first slice would have.
        divider = [newline if columns == 1 else comma]
        whole = [placeholder] * overview.tokens
        return whole + divider + joined if plan.overview_first else joined + divider + whole
    ids: list[int] = []
    for index, each in enumerate(maps, start=-int(plan.overview_first)):
        ids += [placeholder] * each.tokens
        if config.layout == "slices" and 0 <= index < plan.num_slices:
            ids.append(newline if (index + 1) % columns == 0 else comma)
    return ids
