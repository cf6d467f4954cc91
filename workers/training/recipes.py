"""The two recipes of training: `notebook`, exactly the reference of 2020, and `field`, for faces as cameras see them.

A recipe is settings, an optimiser with its schedule, and a loss. Choosing the faces of a batch is left to `batches`,
the loop to `fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from common.domain import MaskwatchError

#: Epochs in which the learning rate of `field` rises to its peak.
WARM_UP_EPOCHS = 2
#: Labels of faces of a few pixels are sometimes wrong; smoothed labels make the network tolerate that.
LABEL_SMOOTHING = 0.05


class Recipe(StrEnum):
    NOTEBOOK = "notebook"
    FIELD = "field"


@dataclass(frozen=True, slots=True)
class Stage:
    """Some epochs with crops of one size. side: pixels."""

    side: int
    epochs: int


@dataclass(frozen=True, slots=True)
class FitSettings:
    """All that a training depends on besides its faces.

    stages: sizes of crops one after the other; small crops at the beginning let the network see more faces in the time.
    learning_rate: at its peak. patience: epochs without a better validation loss before it stops; None: never.
    precision: a Keras dtype policy. pretrained: whether the network begins with ImageNet's weights.
    """

    arch: str
    recipe: Recipe
    stages: tuple[Stage, ...]
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    patience: int | None = None
    seed: int = 42
    precision: str = "float32"
    pretrained: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise MaskwatchError("a training needs at least one stage")
        if any(stage.epochs < 1 or not 32 <= stage.side <= 256 for stage in self.stages):
            raise MaskwatchError("each stage needs at least one epoch, and sides from 32 to 256 pixels")

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def side(self) -> int:
        """Pixels of the network's input once it is fitted: those of the last stage."""
        return self.stages[-1].side

    def side_in(self, epoch: int) -> int:
        """Pixels of the crops of an epoch, counted from 0."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage.side
            epoch -= stage.epochs
        return self.side

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


#: Default settings of `field` for each network. Large networks begin with small crops: on two cores a step of Xception
#: takes four times as long at 128 pixels as at 64.
FIELD: dict[str, FitSettings] = {
    settings.arch: settings
    for settings in (
        FitSettings("compact", Recipe.FIELD, (Stage(64, 45),), 64, 2e-3, 2e-3, patience=20),
        FitSettings("efficientnet-lite0", Recipe.FIELD, (Stage(96, 16),), 64, 6e-4, 1e-2, patience=8, pretrained=True),
        FitSettings("xception", Recipe.FIELD, (Stage(64, 10), Stage(96, 3), Stage(128, 2)), 64, 1e-3, 5e-3),
    )
}


def settings_for(recipe: Recipe, arch: str) -> FitSettings:
    """The recipe's settings for a network. Raises `MaskwatchError` for an unknown network."""
    if arch not in FIELD:
        raise MaskwatchError(f"unknown architecture {arch!r}; known: {', '.join(FIELD)}")
    if recipe is Recipe.FIELD:
        return FIELD[arch]
    return FitSettings(arch, recipe, (Stage(128, 2),), 32, 1e-4)


def with_stages(settings: FitSettings, stages: Sequence[Stage] | None, epochs: int | None) -> FitSettings:
    """The settings with other stages, or with another number of epochs, divided over the stages in proportion."""
    if stages:
        return replace(settings, stages=tuple(stages))
    if epochs is None:
        return settings
    left, left_before = epochs, settings.epochs
    shared: list[Stage] = []
    # From the end: the last size is the one that workers use, so it keeps at least one epoch.
    for stage in reversed(settings.stages):
        part = max(0 if shared else 1, round(left * stage.epochs / left_before))
        shared.insert(0, replace(stage, epochs=part))
        left, left_before = left - part, left_before - stage.epochs
    return replace(settings, stages=tuple(stage for stage in shared if stage.epochs))


def read_stages(text: str) -> tuple[Stage, ...]:
    """`64:12,96:4` → 12 epochs at 64 pixels, then 4 at 96. Raises `MaskwatchError`."""
    try:
        pairs = [tuple(map(int, part.split(":"))) for part in text.split(",")]
        return tuple(Stage(side, epochs) for side, epochs in pairs)
    except ValueError as error:
        raise MaskwatchError(f"stages {text!r} can't be read; valid: SIDE:EPOCHS,... as in 64:12,96:4") from error


def compile_model(model: Any, settings: FitSettings, steps: int) -> None:
    """Gives the network the recipe's optimiser and loss. steps: batches per epoch."""
    import keras

    if settings.recipe is Recipe.NOTEBOOK:
        # `decay` of the old Keras optimisers: the rate divided by 1 + decay · step, here 1e-4 / epochs.
        rate = keras.optimizers.schedules.InverseTimeDecay(
            settings.learning_rate, decay_steps=1, decay_rate=settings.learning_rate / settings.epochs
        )
        model.compile(
            optimizer=keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"],
            jit_compile=_compile_with_xla(),
        )  # fmt: skip
        return
    total = settings.epochs * steps
    warm_up = min(WARM_UP_EPOCHS * steps, total // 2)
    rate = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate / 20, total - warm_up, alpha=0.002,
        warmup_target=settings.learning_rate, warmup_steps=warm_up,
    )  # fmt: skip
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING),
        jit_compile=_compile_with_xla(),
    )


def _compile_with_xla() -> bool | str:
    """Only for JAX: on a CPU the compilers of TensorFlow and torch take longer than they save."""
    import keras

    return "auto" if keras.backend.backend() == "jax" else False
