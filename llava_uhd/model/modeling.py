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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava_uhd.config.model import CompressionConfig, LlavaUHDConfig
from llava_uhd.language.compressed import (
    check_cache,
    compression_of,
    decode_compressed,
    fewer_tokens,
    is_active,
)
from llava_uhd.language.decoder import cache_of, decode, logit_rule, logits_at, output_with
from llava_uhd.language.loss import LossPlan, supervised_loss
from llava_uhd.model.generation import VocabularyLogitsProcessors, tidy_generation_config
from llava_uhd.model.packing import (
    new_features,
    placeholder_mask,
    repeat_rows,
    write_features,
)
from llava_uhd.model.visuals import VisualTokens
from llava_uhd.projectors import build_projector
from llava_uhd.vision.towers import VisionTower


class LlavaUHDForConditionalGeneration(VisualTokens, PreTrainedModel, GenerationMixin):
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
        visual_runs: torch.Tensor | None = None,
        compression: CompressionConfig | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_plan: LossPlan | None = None,
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
            visual_runs: see `get_visual_runs`, of cached tokens too; None: found by ``view_grids``.
            compression: of this pass, instead of ``config.compression``.
            labels: (B, T), -100 where nothing is learned; not shifted.
            logits_to_keep: last positions with logits, 0: all. None: all, or none with labels.
            num_items_in_batch: learned tokens of the whole optimizer step.
            loss_plan: how many logits are alive at a time; None: those of all learned tokens.
            **kwargs: passed to the decoder.

        Returns:
            ``loss`` (with labels), ``logits`` (B, kept, vocabulary) or None, cache and the like.
            Under compression the logits are those of the shortened sequence.
        """
        pictured = pixel_values is not None or image_features is not None
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and pictured):
            raise ValueError("pass either input_ids (with their images) or inputs_embeds (alone)")
        if input_ids is not None:
            images = (pixel_values, view_grids, image_features, token_maps)
            inputs_embeds = self.embed(input_ids, *images)
        if visual_runs is None and (pictured or input_ids is None):
            visual_runs = self._found_runs(compression, input_ids, view_grids, token_maps)
        # A cache object would switch off the detection of packed samples.
        kwargs["use_cache"] = False if labels is not None else use_cache
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {} if past_key_values is None else {"cache": past_key_values}
        outputs, labels = self._decode(inputs_embeds, labels, visual_runs, compression, kwargs)
        return self._scored(outputs, labels, logits_to_keep, num_items_in_batch, loss_plan)

    def _compresses(self, compression: CompressionConfig | None) -> bool:
        """Whether a pass shortens visual tokens; decided anew in every one."""
        options = compression_of(self.config.compression, compression)
        return is_active(options, self.config.text_config.num_hidden_layers)

    def _found_runs(
        self,
        compression: CompressionConfig | None,
        input_ids: torch.Tensor | None,
        view_grids: torch.Tensor | None,
        token_maps: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Runs of a call that names none, if it needs them."""
        if not self._compresses(compression):
            return None
        if input_ids is None:
            raise ValueError(
                "under compression inputs_embeds need visual_runs (get_visual_runs; without "
                "images an empty (B, 0, 3))"
            )
        return self.get_visual_runs(input_ids, view_grids, token_maps)

    def _decode(
        self,
        inputs_embeds: torch.Tensor | None,
        labels: torch.Tensor | None,
        runs: torch.Tensor | None,
        compression: CompressionConfig | None,
        kwargs: dict[str, Any],
    ) -> tuple[BaseModelOutputWithPast, torch.Tensor | None]:
        """Output of the decoder and the labels of its positions, fewer ones under compression."""
        if inputs_embeds is not None and runs is None and self.training:
            # Texts alone: the same path as on other processes, whose batches have images.
            runs = torch.zeros(len(inputs_embeds), 0, 3, dtype=torch.long)
        if runs is None or inputs_embeds is None or not self._compresses(compression):
            check_cache(kwargs.get("cache"), None)
            return decode(self.language_model, inputs_embeds=inputs_embeds, **kwargs), labels
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not available under compression: layers differ in it")
        options = compression_of(self.config.compression, compression)
        hidden, cache, table = decode_compressed(
            self.get_decoder(), options, runs, inputs_embeds, **kwargs
        )
        if labels is not None and table is not None:
            labels = table.labels(labels.to(hidden.device))
        return output_with(hidden, cache), labels

    def _scored(
        self,
        outputs: BaseModelOutputWithPast,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor | None,
        num_items: torch.Tensor | int | None,
        plan: LossPlan | None,
    ) -> CausalLMOutputWithPast:
        """What `forward` returns of the output of the decoder."""
        hidden = outputs.last_hidden_state  # (B, T, D)
        head, rule = self.get_output_embeddings(), logit_rule(self.config.text_config)
        loss = logits = None
        if labels is not None:
            labels = labels.to(hidden.device)
            loss = supervised_loss(head, hidden, labels, num_items, plan, rule)
        if labels is None or logits_to_keep is not None:
            keep = 0 if logits_to_keep is None else logits_to_keep
            logits = logits_at(head, hidden, keep, rule)
        return CausalLMOutputWithPast(
            loss, logits, cache_of(outputs), outputs.hidden_states, outputs.attentions
        )

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
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
            if self._compresses(kwargs.get("compression")) and prompt is not None:
                if view_grids is not None:
                    runs = self.get_visual_runs(prompt, view_grids, token_maps)
                    kwargs.setdefault("visual_runs", runs)
                kwargs["prompt_length"] = prompt.shape[1]
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        prompt_length: int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adds the image tokens to the steps that see the prompt."""
        if cache is not None:  # named for the library, which takes what it finds in the signature
            kwargs["cache"] = cache
        if is_first_iteration and kwargs.get("next_sequence_length") is not None:
            kept = cache if cache is not None else kwargs.get("past_key_values")
            kwargs["next_sequence_length"] -= fewer_tokens(kept)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            if (new := inputs.get("input_ids")) is not None:
                mask = placeholder_mask(input_ids, self.config.image.image_token_id)
                image_features = new_features(image_features, mask, new.shape[1])
            inputs["image_features"] = image_features
            if prompt_length is not None and image_features is not None:
                inputs["scored_at"] = prompt_length - 1
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
