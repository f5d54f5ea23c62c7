"""Which template a published model was trained with: its files do not say, its name does."""

from __future__ import annotations

from llava_uhd.errors import UserError
from llava_uhd.text.templates.base import TEMPLATES

MARKED_END = "_im_start_end"


def published_template(
    name: str, language_model_type: str = "", *, im_start_end: bool = False
) -> str:
    """Template of a published model.

    As in the published chat, with these differences: the language model decides where the name
    says nothing or something else; ``v1`` where the chat takes ``llava_v1``, because training and
    evaluation took it; ``llava_v0``, the chat's last resort, for names with "v0" only.

    Args:
        name: of the model or its folder, as it was published, in any case.
        language_model_type: ``model_type`` of the language model (llama, mistral, qwen2, mpt, ...,
            also in the published spelling llava_llama, ...), or an empty text.
        im_start_end: the model has tokens around its images (``mm_use_im_start_end``).

    Returns:
        A name in `TEMPLATES`. Examples: ``("llava-v1.5-7b", "llama")`` is ``v1``;
        ``("llava-onevision-qwen2-7b-ov", "qwen2")`` is ``qwen_1_5``.

    Raises:
        UserError: there is no such template with tokens around the images.
    """
    chosen = _by_model(name.lower(), language_model_type.lower())
    if not im_start_end:
        return chosen
    if chosen + MARKED_END not in TEMPLATES:
        known = [each for each in TEMPLATES if each.endswith(MARKED_END)]
        raise UserError(
            f"model {name!r}: mm_use_im_start_end is set, and there is no template "
            f"'{chosen + MARKED_END}' (known: {', '.join(known)}): register one in "
            "llava_uhd/text/templates"
        )
    return chosen + MARKED_END


def _by_model(name: str, kind: str) -> str:
    if "qwen" in kind or ("qwen" in name and "llama" not in kind):
        return "qwen_1_5"
    if "mpt" in kind:
        return "mpt"
    if "mistral" in kind or "mixtral" in kind:
        return _by_mistral(name)
    if any(word in name for word in ("llama-3", "llama3", "llama_3")):
        return "llama_3"
    if "llama-2" in name:
        return "llava_llama_2" if "llava" in name else "llama_2"
    if "mistral" in name or "mixtral" in name:
        return _by_mistral(name)
    if "v1.6-34b" in name:
        return "chatml_direct"
    # First stages, whose images stand between tags.
    tagged = "mmtag" in name or ("plain" in name and "finetune" not in name)
    if "v1" in name:
        return "v1_mmtag" if tagged else "v1"
    if "mpt" in name:
        return "mpt"
    if "v0" in name:
        return "v0_mmtag" if tagged else "llava_v0"
    return "v1"


def _by_mistral(name: str) -> str:
    return "chatml_direct" if "hermes" in name else "mistral_instruct"
