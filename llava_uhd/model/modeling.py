"""One model: vision tower, projector and any causal language model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.maps import Newline, uses_maps, whole_map
from llava_uhd.images.tokens import view_token_shapes
from llava_uhd.language.decoder import cache_of, decode, logits_at, supervised_loss
from llava_uhd.model.generation import VocabularyLogitsProcessors, tidy_generation_config
from llava_uhd.model.packing import (
    merge_views,
    placeholder_mask,
    repeat_rows,
    write_features,
)
from llava_uhd.projectors import build_projector
from llava_uhd.vision.towers import VisionTower


class LlavaUHDForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Multimodal language model over packed views of any shape.

    The processor lays the whole sequence out (placeholders and separators); the model embeds it
    and overwrites the placeholders with the projected views, in reading order.

    Attributes:
        vision_tower: `VisionTower`.
        projector: the registered projector of ``config.projector``.
        image_newline: (D,) learned newline of the layout "unpad", else None.
        language_model: built by ``AutoModelForCausalLM`` from ``config.text_config``.
    """

    config: LlavaUHDConfig
    config_class = LlavaUHDConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "CLIPEncoderLayer",
        "SiglipEncoderLayer",
        "WindowAttention",
        "HiwinProjector",
    ]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LlavaUHDConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config.vision_config, config.select_layer)
        self.projector = build_projector(config)
        self.image_newline = (
            nn.Parameter(torch.empty(config.hidden_size)) if config.has_newline else None
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        reset = getattr(module, "reset_weights", None)
        if callable(reset):
            reset()

    def reset_weights(self) -> None:
        """Published initial values of the parameter held directly by the model."""
        if self.image_newline is not None:
            init.normal_(self.image_newline, std=self.config.hidden_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's head."""
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.language_model.get_decoder()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        view_grids: torch.Tensor,
        token_maps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encodes and projects packed views.

        Args:
            pixel_values: (P, 3 * p * p) packed patches.
            view_grids: (V, 2) integer (rows, columns).
            token_maps: (M, 10) integer, how the views' tokens become those of the sequence (the
                fields of `llava_uhd.images.maps.TokenMap`): needed where they are joined, pooled
                or have learned newlines.

        Returns:
            (N, D) tokens of all images and videos, in the order of the sequence.

        Raises:
            ValueError: ``token_maps`` are missing, or belong to other views.
        """
        features = self.vision_tower(pixel_values, view_grids)  # (P, C)
        tokens = self.projector(features, view_grids, pixel_values)
        if not uses_maps(self.config.image, self.config.video):
            return tokens
        if token_maps is None:
            raise ValueError(
                f"image.layout '{self.config.image.layout}' needs token_maps: pass all the "
                "processor returned"
            )
        grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
        shapes = view_token_shapes(self.config.projector, grids)
        newline = self.image_newline
        merged = merge_views(tokens, shapes, token_maps, newline)
        if newline is not None and self.training:
            # Part of the graph in every step, also where no map of the batch has a newline.
            merged = merged + newline.sum() * 0.0
        return merged

    def _vision_anchor(self) -> torch.Tensor:
        """Zero, connected to every tower and projector parameter, at the cost of four patches.

        A training batch without images still runs both modules once, so that gradients exist on
        every rank and sharded ranks make the same collective calls.
        """
        patch = self.config.vision_config.patch_size
        # An upsampler needs maps of at least 2 x 2.
        pixels = torch.zeros(4, 3 * patch * patch, device=self.device)
        (shape,) = view_token_shapes(self.config.projector, [(2, 2)])
        end = Newline.END if self.image_newline is not None else Newline.NONE
        one_view, one_map = torch.tensor([[2, 2]]), torch.tensor([whole_map(shape, newline=end)])
        return self.get_image_features(pixels, one_view, one_map).sum() * 0.0

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        view_grids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        token_maps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeds tokens and writes image tokens over the placeholders.

        Args:
            input_ids: (B, T); placeholders never reach the embedding table.
            pixel_values: (P, 3 * p * p), with ``view_grids`` (V, 2); or
            view_grids: see ``pixel_values``.
            image_features: (N, D) tokens that `get_image_features` gave before.
            token_maps: see `get_image_features`.

        Returns:
            (B, T, D).

        Raises:
            ValueError: placeholders and image tokens differ in number.
        """
        mask = placeholder_mask(input_ids, self.config.image.image_token_id)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        if image_features is None and pixel_values is not None:
            if view_grids is None:
                raise ValueError("pixel_values need view_grids: pass all the processor returned")
            image_features = self.get_image_features(pixel_values, view_grids, token_maps)
        if image_features is not None:
            return write_features(embeddings, mask, image_features.to(embeddings.device))
        # A decoding step holds one generated token, never a placeholder.
        if input_ids.shape[1] > 1 and bool(mask.any()):
            raise ValueError(
                f"input_ids hold {int(mask.sum())} image placeholders but no pixel_values were "
                "given: pass all the processor returned"
            )
        if self.training:
            embeddings = embeddings + self._vision_anchor().to(embeddings)
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_grids: torch.Tensor | None = None,
        token_maps: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over text with images.

        Args:
            input_ids: (B, T), or ``inputs_embeds`` (B, T, D).
            attention_mask: (B, T).
            position_ids: (B, T); restarting positions pack several samples in a row (no mask then).
            past_key_values: cache of earlier positions.
            inputs_embeds: instead of ``input_ids``.
            pixel_values: (P, 3 * p * p) packed patches of all images of the batch, row by row.
            view_grids: (V, 2) integer (rows, columns) of the views.
            token_maps: see `get_image_features`.
            image_features: (N, D) instead of ``pixel_values``.
            labels: (B, T), -100 where nothing is learned; not shifted.
            logits_to_keep: last positions with logits, 0: all. None: all, or none with labels.
            num_items_in_batch: learned tokens of the whole optimizer step.
            **kwargs: passed to the decoder.

        Returns:
            ``loss`` (with labels), ``logits`` (B, kept, vocabulary) or None, cache and the like.
        """
        pictured = pixel_values is not None or image_features is not None
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and pictured):
            raise ValueError("pass either input_ids (with their images) or inputs_embeds (alone)")
        if input_ids is not None:
            images = (pixel_values, view_grids, image_features, token_maps)
            inputs_embeds = self.embed(input_ids, *images)
        outputs = decode(
            self.language_model,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            # A cache object would switch off the detection of packed samples.
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )
        loss, logits = self._loss_and_logits(
            outputs.last_hidden_state, labels, logits_to_keep, num_items_in_batch
        )
        return CausalLMOutputWithPast(
            loss, logits, cache_of(outputs), outputs.hidden_states, outputs.attentions
        )

    def _loss_and_logits(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `forward` computes of hidden states (B, T, D)."""
        head = self.get_output_embeddings()
        loss = logits = None
        if labels is not None:
            loss = supervised_loss(head, hidden, labels.to(hidden.device), num_items)
        if labels is None or logits_to_keep is not None:
            logits = logits_at(head, hidden, 0 if logits_to_keep is None else logits_to_keep)
        return loss, logits

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_grids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        token_maps: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The library's ``generate``; images are encoded once, whatever the number of beams.

        Args:
            inputs: ``input_ids`` (B, T), left-padded; may be given as ``input_ids=``.
            pixel_values: see `forward`.
            view_grids: see `forward`.
            image_features: see `forward`.
            token_maps: see `get_image_features`.
            **kwargs: of ``transformers.GenerationMixin.generate``.

        Returns:
            Prompt and new ids, (B, T + new), or the library's output object.
        """
        if image_features is None and pixel_values is not None:
            if view_grids is None:
                raise ValueError("pixel_values need view_grids: pass all the processor returned")
            image_features = self.get_image_features(
                pixel_values.to(self.device), view_grids, token_maps
            )
        if image_features is not None:
            kwargs["image_features"] = image_features
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adds the image tokens to the steps that see the prompt."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["image_features"] = image_features
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        if image_features is not None and expand_size > 1 and input_ids is not None:
            mask = placeholder_mask(input_ids, self.config.image.image_token_id)
            image_features = repeat_rows(image_features, mask, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if image_features is not None:
            model_kwargs["image_features"] = image_features
        return input_ids, model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> VocabularyLogitsProcessors:
        placeholder, prompt = self.config.image.image_token_id, kwargs.get("encoder_input_ids")
        if placeholder is not None and prompt is not None and prompt.dtype == torch.long:
            kwargs["encoder_input_ids"] = prompt.masked_fill(prompt == placeholder, 0)
        processors = super()._get_logits_processor(*args, **kwargs)
        return VocabularyLogitsProcessors(processors, placeholder)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The library's ``save_pretrained``, with a generation config that it accepts."""
        if self.generation_config is not None:
            tidy_generation_config(self.generation_config)
        return super().save_pretrained(*args, **kwargs)


AutoConfig.register("llava_uhd", LlavaUHDConfig)
AutoModelForCausalLM.register(LlavaUHDConfig, LlavaUHDForConditionalGeneration)
AutoModelForImageTextToText.register(LlavaUHDConfig, LlavaUHDForConditionalGeneration)
