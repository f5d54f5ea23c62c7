"""What the quickstart can show: one entry per system, each a sequence of recipes."""

from __future__ import annotations

from dataclasses import dataclass

from llava_uhd.registry import Registry


@dataclass(frozen=True)
class Reading:
    """One way to read large pictures, trained in the second stage.

    Attributes:
        folder: name of its output folder.
        recipe: of its second stage.
        title: a few words.
        description: one line.
    """

    folder: str
    recipe: str
    title: str
    description: str


@dataclass(frozen=True)
class System:
    """A system and its demonstration.

    Attributes:
        pretrain: recipe of the first stage.
        main: the reading that is shown.
        controls: readings that ``--compare`` adds.
        vdim: recipe that pre-trains the upsampler before the first stage, if the system has one.
    """

    pretrain: str
    main: Reading
    controls: tuple[Reading, ...] = ()
    vdim: str | None = None

    @property
    def pretrain_folder(self) -> str:
        """Name of the first stage's output folder."""
        return f"{self.main.folder}-pretrain"

    @property
    def vdim_folder(self) -> str:
        """Name of the upsampler's output folder."""
        return f"{self.main.folder}-vdim"


SYSTEMS: Registry[System] = Registry("system of the quickstart")
SYSTEMS.add(
    "uhd_v1",
    System(
        pretrain="quickstart/pretrain",
        main=Reading(
            "quickstart",
            "quickstart/finetune",
            "native-resolution slices",
            "slices cut from the picture at its own resolution, and the overview",
        ),
        controls=(
            Reading(
                "quickstart-squeeze",
                "quickstart/finetune_squeeze",
                "one low-resolution square",
                "the whole picture squeezed into one square view, as fixed-resolution models do",
            ),
            Reading(
                "quickstart-blurred",
                "quickstart/finetune_blurred",
                "slices without detail",
                "the same slices and as many tokens, cut from a low-resolution copy blown up again",
            ),
        ),
    ),
)
SYSTEMS.add(
    "uhd_v2",
    System(
        vdim="vdim/quickstart",
        pretrain="quickstart/uhd_v2_pretrain",
        main=Reading(
            "quickstart-uhd_v2",
            "quickstart/uhd_v2_finetune",
            "slices and a feature pyramid",
            "slices in native resolution; windows over the tower's map and one 4x as fine",
        ),
    ),
)
SYSTEMS.add(
    "llavolta",
    System(
        pretrain="quickstart/llavolta_pretrain",
        main=Reading(
            "quickstart-llavolta",
            "quickstart/llavolta_finetune",
            "slices, compressed in training",
            "the same slices; in three quarters of the steps the language model pools their tokens",
        ),
        controls=(
            Reading(
                "quickstart-llavolta-uncompressed",
                "quickstart/llavolta_uncompressed",
                "slices, never compressed",
                "the same slices, steps and rates; all tokens in every step",
            ),
        ),
    ),
)
