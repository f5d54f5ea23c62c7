"""What a VDIM pre-training is: the typed sections of its recipes.

The upsampler of LLaVA-UHD v2 (the visual detail injection module) learns before the language model
is there, from pictures alone. Names that the published configuration uses are kept
(``max_pad``, ``n_jitters``, ``random_projection``, ...).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llava_uhd.config.recipe import RecipeKind, load_kind
from llava_uhd.config.resolved import Resolved
from llava_uhd.config.training import TrainerConfig
from llava_uhd.errors import UserError

# Mean and standard deviation of the published pre-training, for towers of any kind.
IMAGENET: tuple[tuple[float, ...], tuple[float, ...]] = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)


@dataclass
class TowerSection:
    """Whose features the upsampler learns to enlarge.

    Attributes:
        path: folder or hub id of a vision tower, or the mapping of a transformers configuration
            (with ``model_type``) to start one from nothing, for tests.
        select_layer: hidden state of the tower that is used.
    """

    path: str | dict[str, Any] | None = None
    select_layer: int = -2


@dataclass
class PictureConfig:
    """Which pictures are read and what is done to them.

    Attributes:
        root: folder that holds ``cocostuff/curated/SPLIT/LIST.txt`` and
            ``cocostuff/images/SPLIT/ID.jpg``.
        split: of the training pictures, under `root`.
        list: of the training pictures: the name of a file beside it without ``.txt``, or a
            published subset: "6", "7".
        held_out_split: of the pictures that measure the result, under `root`.
        held_out_list: their list.
        folder: any folder of pictures instead of `root`, searched with its sub-folders.
        held_out_folder: pictures that measure a run on `folder`; None takes every 20th of `folder`.
        embedded: name of a data set that the package draws itself, instead of both: its tiles, and
            as many pictures of shapes in front of each other.
        held_out: most held-out pictures that are measured.
        photographs: measure the two photographs that scikit-learn ships, too, where it is
            installed.
        res: side of the square pictures in pixels, a multiple of the tower's patch.
        resize: filter that brings the shorter side to `res`. "nearest" is the published one.
        crop: "center", or "random" for another cut each time.
        normalisation: of the pictures, for tower and upsampler alike: "tower" (the tower's own), or
            "imagenet" (published).
        on_broken_picture: "error" stops; "skip" takes the next readable picture and says so.
        follow_links: allow links inside `folder` that lead out of it.
    """

    root: str | None = None
    split: str = "train2017"
    list: str = "Coco164kFull_Stuff_Coarse"
    held_out_split: str = "val2017"
    held_out_list: str = "coco_validation50"
    folder: str | None = None
    held_out_folder: str | None = None
    embedded: str | None = None
    held_out: int = 64
    photographs: bool = True
    res: int = 336
    resize: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    crop: Literal["center", "random"] = "center"
    normalisation: Literal["tower", "imagenet"] = "tower"
    on_broken_picture: Literal["error", "skip"] = "error"
    follow_links: bool = False

    def __post_init__(self) -> None:
        for name in ("res", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        given = [name for name in ("root", "folder", "embedded") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"data.{' and data.'.join(given)} exclude each other: set one of them")


@dataclass
class VdimConfig:
    """What is learned and by which loss.

    Attributes:
        scale: of the largest map that the stack makes: 2, 4 or 8.
        downsampler: "attention" (published) or "simple", one kernel for every place.
        blur: blur maps before the attention downsampler reads them (published).
        dropout: of the channels that the attention downsampler's logits are made of (published).
        n_jitters: views of each picture per step.
        max_pad: pixels of reflected border that a view may show.
        max_zoom: views are enlarged by up to this factor.
        use_flips: mirror every second view.
        random_projection: features are compared after a random projection to this many channels;
            None compares all channels.
        predicted_uncertainty: weigh errors by an uncertainty that a small net predicts.
        detach: later stages do not teach earlier ones (published).
        reuse_maps: make the maps once per step, for all its views. The published code makes them
            anew for each view; without dropout the gradients are the same.
        crf_weight: of the sampled conditional random field loss.
        crf_points: places that it compares.
        crf_jittered: show it the picture of the view whose features it judges. The published code
            pairs the view's features with the untouched picture.
        tv_weight: of the total variation of the maps.
        filter_ent_weight: of the entropy of the simple downsampler's kernel, which is rewarded.
        clip_steps: steps at the start whose gradient is clipped to `clip_norm`.
        clip_norm: total gradient norm of these steps.
        control: train heads for plainly enlarged features beside the stack's own. They learn from
            the same views, take nothing from the stack, and tell what it is worth.
        measure_every: steps between two measurements on held-out pictures; None measures at the
            end only.
        measure_views: views of each held-out picture.
        picture_every: steps between two pictures of the features; None draws at the end only.
    """

    scale: int = 4
    downsampler: Literal["attention", "simple"] = "attention"
    blur: bool = True
    dropout: float = 0.2
    n_jitters: int = 2
    max_pad: int = 30
    max_zoom: float = 2.0
    use_flips: bool = True
    random_projection: int | None = 30
    predicted_uncertainty: bool = True
    detach: bool = False
    reuse_maps: bool = True
    crf_weight: float = 0.001
    crf_points: int = 1000
    crf_jittered: bool = True
    tv_weight: float = 0.0
    filter_ent_weight: float = 0.0
    clip_steps: int = 10
    clip_norm: float = 1e-4
    control: bool = True
    measure_every: int | None = None
    measure_views: int = 4
    picture_every: int | None = None

    def __post_init__(self) -> None:
        if self.scale not in (2, 4, 8):
            raise UserError(f"vdim.scale must be 2, 4 or 8, got {self.scale}")
        for name in (
            "n_jitters",
            "crf_points",
            "measure_views",
            "random_projection",
            "measure_every",
            "picture_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"vdim.{name} must be at least 1, got {value}")
        for name in ("max_pad", "crf_weight", "tv_weight", "filter_ent_weight", "clip_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"vdim.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"vdim.dropout must be at least 0 and below 1, got {self.dropout}")
        if self.max_zoom < 1:
            raise UserError(f"vdim.max_zoom must be at least 1, got {self.max_zoom}")
        if self.clip_norm <= 0:
            raise UserError(f"vdim.clip_norm must be above 0, got {self.clip_norm}")
        if self.filter_ent_weight and self.downsampler != "simple":
            raise UserError(
                "vdim.filter_ent_weight needs vdim.downsampler simple: the attention downsampler "
                "has no kernel of its own"
            )

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales whose maps are taught.

        Example: a stack of scale 8 is taught at 2, 4 and 8.
        """
        return tuple(scale for scale in (2, 4, 8) if scale <= self.scale)


@dataclass
class VdimRecipe(Resolved):
    """A whole pre-training. Made by `load_vdim_recipe`.

    Attributes:
        name: of the recipe it was loaded from.
        tower: whose features.
        data: pictures.
        vdim: upsampler and losses.
        trainer: the rest; the optimizer is always NAdam.
        debug: shrunken run on a tiny tower.
    """

    name: str
    tower: TowerSection
    data: PictureConfig
    vdim: VdimConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    debug: bool = False

    def __post_init__(self) -> None:
        if self.tower.path is None:
            raise UserError("tower.path is missing: name the folder or hub id of a vision tower")
        if self.data.root is None and self.data.folder is None and self.data.embedded is None:
            raise UserError(
                "data.root is missing: the folder that holds cocostuff/ (or give data.folder, any "
                "folder of pictures)"
            )
        if self.vdim.max_pad >= self.data.res:
            raise UserError(
                f"vdim.max_pad {self.vdim.max_pad} must be smaller than data.res {self.data.res}"
            )
        if self.trainer.group_by_modality_length:
            raise UserError("trainer.group_by_modality_length: pictures alone have one modality")
        if self.trainer.arguments.get("fp16"):
            raise UserError("trainer.fp16 loses small gradients here: use trainer.bf16")
        if "optim" in self.trainer.arguments:
            raise UserError(
                f"trainer.optim {self.trainer.arguments['optim']}: the upsampler is always trained "
                "with NAdam, leave it out"
            )


VDIM_RECIPES: RecipeKind[VdimRecipe] = RecipeKind(
    make=VdimRecipe.from_flat,
    keys=VdimRecipe.keys,
    prefix="vdim/",
    debug_overlay="_base/vdim_debug",
    command="bash vdim-pretrain.sh",
    rivals={
        "data.root": ("data.folder", "data.held_out_folder", "data.embedded"),
        "data.folder": ("data.root", "data.embedded"),
        "data.embedded": ("data.root", "data.folder", "data.held_out_folder"),
        "trainer.global_batch_size": ("trainer.gradient_accumulation_steps",),
        "trainer.gradient_accumulation_steps": ("trainer.global_batch_size",),
        "trainer.num_train_epochs": ("trainer.max_steps",),
    },
)


def load_vdim_recipe(name_or_path: str, overrides: list[str], *, debug: bool = False) -> VdimRecipe:
    """Loads a VDIM recipe as `llava_uhd.config.recipe.load_recipe` loads the others.

    Raises:
        UserError: see there.
    """
    return load_kind(VDIM_RECIPES, name_or_path, overrides, debug=debug)
