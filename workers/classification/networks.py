"""The classifiers' networks in Keras 3, by name: what training fits, and what the native runtime runs.

Every builder gives a model float32 (n, side, side, 3) in [-1, 1] → softmax (n, 2), in the order `with_mask`,
`without_mask`, with layer names that depend on nothing but the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: (channels, blocks) of each stage of `compact`; each but the first begins by halving the resolution.
COMPACT_STAGES = ((64, 1), (128, 2), (192, 3), (256, 2))

#: EfficientNet-Lite0's stages: kernel, stride of the first block, expansion, channels, blocks (Tan and Le 2019,
#: table 1, as EfficientNet-Lite keeps it: no squeeze-and-excitation, ReLU6 instead of swish).
LITE0_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip


def build(arch: str, side: int | None) -> Any:
    """The network of that name, untrained. `side` None leaves the input's size open. `ValueError` for another name."""
    if arch not in BUILDERS:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(BUILDERS)}")
    return BUILDERS[arch](side)


def build_compact(side: int | None) -> Any:
    """Separable convolutions with residuals, small enough for one core of a camera server: 255,458 parameters."""
    import keras
    from keras import layers

    def normalised(x: Any) -> Any:
        return layers.BatchNormalization(momentum=0.95)(x)

    def separable(x: Any, channels: int, strides: int) -> Any:
        """Depthwise then pointwise, as in MobileNet (Howard et al. 2017), with a residual where shapes allow."""
        y = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x)
        y = layers.ReLU()(normalised(y))
        y = normalised(layers.Conv2D(channels, 1, use_bias=False)(y))
        if strides == 1 and x.shape[-1] == channels:
            y = layers.Add()([x, y])
        return layers.ReLU()(y)

    inputs = keras.Input((side, side, 3), name="crops")
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(normalised(x))
    for stage, (channels, blocks) in enumerate(COMPACT_STAGES):
        # The first stage keeps the resolution of the stem: faces of ten pixels have nothing to give away.
        for block in range(blocks):
            x = separable(x, channels, strides=2 if block == 0 and stage > 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.3)(x)
    outputs = layers.Dense(2, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, outputs, name="compact")


def build_xception(side: int | None) -> Any:
    """The notebook's network: Keras's Xception without its top, global average pooling, Dense 1024, Dropout 0.5,
    softmax 2. 22,961,706 parameters."""
    import keras
    from keras import layers

    # Keras asks for 71 pixels where a size is named, though the network works from 32 on: so none is named here.
    base = keras.applications.Xception(include_top=False, weights=None, input_shape=(None, None, 3))
    inputs = keras.Input((side, side, 3), name="crops")
    x = layers.GlobalAveragePooling2D()(base(inputs))
    x = layers.Dense(1024, activation="relu", name="hidden")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(2, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, outputs, name="xception")


def build_efficientnet_lite0(side: int | None) -> Any:
    """EfficientNet-Lite0 (Google, tensorflow/tpu, Apache-2.0) with a softmax over our two classes: 3,415,586 parameters."""
    import keras
    from keras import layers

    def normalised(x: Any, name: str) -> Any:
        return layers.BatchNormalization(momentum=0.97, epsilon=1e-3, name=name)(x)

    def convolved(x: Any, channels: int, kernel: int, strides: int, name: str) -> Any:
        return layers.Conv2D(channels, kernel, strides, padding="same", use_bias=False, name=name)(x)

    inputs = keras.Input((side, side, 3), name="crops")
    x = layers.ReLU(6.0)(normalised(convolved(inputs, 32, 3, 2, "stem"), "stem_norm"))
    number = 0
    for kernel, first_stride, expansion, channels, blocks in LITE0_STAGES:
        for block in range(blocks):
            strides = first_stride if block == 0 else 1
            name = f"block{number}"
            y = x
            if expansion > 1:
                y = convolved(y, expansion * x.shape[-1], 1, 1, f"{name}_expand")
                y = layers.ReLU(6.0)(normalised(y, f"{name}_expand_norm"))
            y = layers.DepthwiseConv2D(kernel, strides, padding="same", use_bias=False, name=f"{name}_depthwise")(y)
            y = layers.ReLU(6.0)(normalised(y, f"{name}_depthwise_norm"))
            y = normalised(convolved(y, channels, 1, 1, f"{name}_project"), f"{name}_project_norm")
            if strides == 1 and x.shape[-1] == channels:
                y = layers.Add()([x, y])
            x = y
            number += 1
    x = layers.ReLU(6.0)(normalised(convolved(x, 1280, 1, 1, "head"), "head_norm"))
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.3)(x)
    outputs = layers.Dense(2, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, outputs, name="efficientnet-lite0")


BUILDERS: dict[str, Callable[[int | None], Any]] = {
    "xception": build_xception,
    "compact": build_compact,
    "efficientnet-lite0": build_efficientnet_lite0,
}
