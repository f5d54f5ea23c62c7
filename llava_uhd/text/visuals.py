"""Images and videos as the model reads them: ids in the text, packed patches, token maps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from llava_uhd.config.model import ImageConfig, ProjectorConfig, VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images.maps import TokenMap, image_maps, video_maps
from llava_uhd.images.pixels import ImageSource, open_image, pack_views, remove_detail
from llava_uhd.images.strategies import plan_frame, plan_image, prepared_size
from llava_uhd.images.tokens import view_token_shapes
from llava_uhd.images.video import VideoSource, read_video
from llava_uhd.text.layout import image_ids
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER

MARKERS = re.compile(f"{re.escape(IMAGE_MARKER)}|{re.escape(VIDEO_MARKER)}")


class EncodedVisual(NamedTuple):
    """One image or video as the model reads it.

    Attributes:
        ids: in the text, placeholders and separators.
        pixel_values: float32 (P, 3 * p * p) packed patches.
        view_grids: int64 (V, 2) (rows, columns) of the views.
        maps: of its tokens, in the order of the sequence.
    """

    ids: list[int]
    pixel_values: torch.Tensor
    view_grids: torch.Tensor
    maps: list[TokenMap]

    @property
    def num_tokens(self) -> int:
        """Placeholders, without separators."""
        return sum(each.tokens for each in self.maps)


@dataclasses.dataclass(frozen=True)
class VisualEncoder:
    """Turns files and pictures into `EncodedVisual` under one model's configuration.

    Attributes:
        image: how images become views, with the ids of placeholder and separators.
        video: how videos are read.
        projector: how views become tokens.
    """

    image: ImageConfig
    video: VideoConfig
    projector: ProjectorConfig

    def image_ids(
        self, width: int, height: int, overview_only: bool = False, several: bool = False
    ) -> list[int]:
        """What stands in the text for an image of this size."""
        plan = plan_image(self.image, width, height, overview_only, several)
        shapes = view_token_shapes(self.projector, plan.view_grids)
        return image_ids(plan, image_maps(self.image, plan, shapes), self.image)

    def video_ids(self, frames: int, width: int, height: int) -> list[int]:
        """What stands in the text for a video of as many frames of this size."""
        plan = plan_frame(self.image, self.video, width, height)
        shapes = view_token_shapes(self.projector, plan.view_grids) * frames
        return self._placeholders(video_maps(self.image, self.video, shapes))

    def encode_image(
        self, source: ImageSource, overview_only: bool = False, several: bool = False
    ) -> EncodedVisual:
        """Plans, cuts and packs one image.

        Args:
            source: path, bytes or PIL image.
            overview_only: no slices.
            several: the sample has other images beside it.

        Raises:
            UserError: it cannot be read.
        """
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            raise UserError(f"the processor does not fetch {source}: download it, pass the file")
        image = open_image(source)
        size = prepared_size(self.image, *image.size)
        if size != image.size:
            image = image.resize(size, resample=3)  # Pillow's bicubic filter
        if self.image.detail_side is not None:
            image = remove_detail(image, self.image.detail_side)
        unprepared = dataclasses.replace(self.image, long_side=None)
        plan = plan_image(unprepared, *size, overview_only, several)
        maps = image_maps(self.image, plan, view_token_shapes(self.projector, plan.view_grids))
        pixels, view_grids = pack_views(image, plan, *self.image.normalisation)
        return EncodedVisual(image_ids(plan, maps, self.image), pixels, view_grids, maps)

    def encode_video(self, source: VideoSource) -> EncodedVisual:
        """Reads a video and packs its frames.

        Args:
            source: see `read_video`.

        Raises:
            UserError: it cannot be read.
        """
        packed = []
        for frame in read_video(source, self.video).frames:
            plan = plan_frame(self.image, self.video, *frame.size)
            packed.append(pack_views(frame, plan, *self.image.normalisation))
        view_grids = torch.cat([grids for _, grids in packed])
        shapes = view_token_shapes(self.projector, [(r, c) for r, c in view_grids.tolist()])
        maps = video_maps(self.image, self.video, shapes)
        pixels = torch.cat([pixels for pixels, _ in packed])
        return EncodedVisual(self._placeholders(maps), pixels, view_grids, maps)

    def _placeholders(self, maps: Sequence[TokenMap]) -> list[int]:
        placeholder = self.image.image_token_id
        if placeholder is None:
            raise ValueError("image.image_token_id must be set")
        return [placeholder] * sum(each.tokens for each in maps)

    def encode_all(
        self,
        text: str,
        images: Sequence[ImageSource],
        videos: Sequence[VideoSource] = (),
        overview_only: bool = False,
    ) -> list[EncodedVisual]:
        """Encodes what the markers of a text stand for, in their order.

        Raises:
            UserError: markers and images or videos differ in number, or one cannot be read.
        """
        several = len(images) > 1
        encoded = []
        for marker, index in marked(text, len(images), len(videos)):
            if marker == IMAGE_MARKER:
                encoded.append(self.encode_image(images[index], overview_only, several))
            else:
                encoded.append(self.encode_video(videos[index]))
        return encoded


def markers_of(text: str, num_videos: int) -> list[str]:
    """Markers in a text, in their order.

    Without videos ``<video>`` is a word like others: texts about web pages are full of it.
    """
    found = MARKERS.findall(text)
    return found if num_videos else [marker for marker in found if marker == IMAGE_MARKER]


def marked(text: str, num_images: int, num_videos: int) -> Iterator[tuple[str, int]]:
    """(marker, index of its image or video) for each marker of a text.

    Raises:
        UserError: other numbers of markers than of images or videos.
    """
    found = markers_of(text, num_videos)
    for marker, count, kind in (
        (IMAGE_MARKER, num_images, "images"),
        (VIDEO_MARKER, num_videos, "videos"),
    ):
        if found.count(marker) != count:
            raise UserError(
                f"the text has {found.count(marker)} {marker} but {count} {kind} are given"
            )
    places = {IMAGE_MARKER: 0, VIDEO_MARKER: 0}
    for marker in found:
        yield marker, places[marker]
        places[marker] += 1


def vision_inputs(visuals: Sequence[EncodedVisual], with_maps: bool) -> dict[str, torch.Tensor]:
    """What the model reads of images and videos, one after another; empty without any.

    Args:
        visuals: in the order of the sequence.
        with_maps: whether the model needs ``token_maps``.
    """
    if not visuals:
        return {}
    inputs = {
        "pixel_values": torch.cat([each.pixel_values for each in visuals]),
        "view_grids": torch.cat([each.view_grids for each in visuals]),
    }
    if with_maps:
        maps = [each for visual in visuals for each in visual.maps]
        inputs["token_maps"] = torch.tensor(maps, dtype=torch.long)
    return inputs
