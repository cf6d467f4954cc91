"""The classifiers' networks in Keras 3, by name: what training fits, and what the native runtime runs.

Every builder gives a model float32 (n, side, side, 3) in [-1, 1] → softmax (n, 2), in the order `with_mask`,
`without_mask`, with layer names that depend on nothing but the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """Separable convolutions with residuals, small enough for one core of a camera server: 262,146 parameters."""
    import keras
    from keras import layers

    def normalised(x: Any, name: str) -> Any:
        return layers.BatchNormalization(momentum=0.95, name=f"{name}_norm")(x)

    def separable(x: Any, channels: int, strides: int, name: str) -> Any:
        """Depthwise then pointwise, as in MobileNet (Howard et al. 2017), with a residual where shapes allow."""
        depthwise, pointwise = f"{name}_depthwise", f"{name}_pointwise"
        y = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False, name=depthwise)(x)
        y = layers.ReLU()(normalised(y, depthwise))
        y = normalised(layers.Conv2D(channels, 1, use_bias=False, name=pointwise)(y), pointwise)
        if strides == 1 and x.shape[-1] == channels:
            y = layers.Add()([x, y])
        return layers.ReLU()(y)

    inputs = keras.Input((side, side, 3), name="crops")
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.ReLU()(normalised(x, "stem"))
    for stage, (channels, blocks) in enumerate(COMPACT_STAGES):
        # The first stage keeps the resolution of the stem: faces of ten pixels can't lose any.
        for block in range(blocks):
            strides = 2 if block == 0 and stage > 0 else 1
            x = separable(x, channels, strides, f"stage{stage}_block{block}")
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.3)(x)
    outputs = layers.Dense(2, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, outputs, name="compact")


def build_xception(side: int | None) -> Any:
    """The notebook's network: Keras's Xception without its top, global average pooling, Dense 1024, Dropout 0.5,
    softmax 2. 22,961,706 parameters."""
    import keras
    from keras import layers

    # For a fixed size Keras demands at least 71 pixels, though the network works from 32 on: so the size is open.
    base = keras.applications.Xception(include_top=False, weights=None, input_shape=(None, None, 3))
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            # With Keras's 0.99 the statistics take hundreds of steps if the base is trained; frozen, they don't change.
            layer.momentum = 0.95
    inputs = keras.Input((side, side, 3), name="crops")
    x = layers.GlobalAveragePooling2D()(base(inputs))
    x = layers.Dense(1024, activation="relu", name="hidden")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(2, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, outputs, name="xception")


def build_efficientnet_lite0(side: int | None) -> Any:
    """EfficientNet-Lite0 (Google, tensorflow/tpu, Apache-2.0) with a softmax over two classes: 3,415,586 parameters."""
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


def mirrored(model: Any) -> Any:
    """The network that workers run: the mean of `model`'s outputs for each crop and its mirror image.

    Both go through in one batch, so that the weights are in the graph once. On held-out faces this lowered the loss by
    a tenth, at twice the time per crop.
    """
    import keras
    from keras import ops

    inputs = keras.Input(model.input_shape[1:], name="crops")
    both = model(ops.concatenate([inputs, ops.flip(inputs, axis=2)], axis=0))
    outputs = ops.mean(ops.stack(ops.split(both, 2, axis=0)), axis=0)
    return keras.Model(inputs, outputs, name=f"{model.name}_mirrored")


#: Key in the metadata of our ONNX files; its value says, as JSON, which network the file holds and how it was made.
METADATA_KEY = "maskwatch"

#: Suffix of the names of weights that an ONNX file keeps in half precision.
HALF_SUFFIX = ":half"


def folded(fitted: Any, fresh: Any) -> Any:
    """`fresh`, a network of the same architecture, with the weights of `fitted`, its normalisation folded into the
    convolutions before it: the rest of a normalisation only adds a bias.

    With kernel W, y = γ (W x - μ) / σ + β is (γ / σ) W x + (β - γ μ / σ), and σ² the variance plus ε.
    """
    for source, target in zip(_layers(fitted), _layers(fresh), strict=True):
        target.set_weights(source.get_weights())
    for layer in _layers(fresh):
        if layer.__class__.__name__ != "BatchNormalization":
            continue
        (producer,) = {layer.input._keras_history.operation}
        gain = np.asarray(layer.gamma) / np.sqrt(np.asarray(layer.moving_variance) + layer.epsilon)
        shift = np.asarray(layer.beta) - gain * np.asarray(layer.moving_mean)
        kernel, by_channel = _last_kernel(producer)
        kernel.assign(np.asarray(kernel) * (gain[:, None] if by_channel else gain))
        layer.set_weights([np.ones_like(gain), shift, np.zeros_like(gain), np.full_like(gain, 1 - layer.epsilon)])
    return fresh


def _last_kernel(layer: Any) -> tuple[Any, bool]:
    """The kernel that makes a convolution's output, and whether its output channels are the last but one axis."""
    match layer.__class__.__name__:
        case "DepthwiseConv2D":
            return layer.kernel, True
        case "SeparableConv2D":
            return layer.pointwise_kernel, False
        case "Conv2D":
            return layer.kernel, False
    raise ValueError(f"layer {layer.name} is followed by a normalisation; only those behind convolutions can be folded")


def _layers(model: Any) -> Iterator[Any]:
    """The layers that have weights, including those of nested networks, in an order that depends only on the
    architecture."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _layers(layer)
        elif layer.weights:
            yield layer


def named_weights(model: Any) -> dict[str, NDArray[np.float32]]:
    """The weights of a folded network by names that depend only on the architecture, in Keras's own layout.

    Weights that folding has made trivial are left out: a normalisation keeps only its shift.
    """
    return {name: np.asarray(variable) for name, variable in _named_variables(model)}


def _named_variables(model: Any) -> Iterator[tuple[str, Any]]:
    for number, layer in enumerate(_layers(model)):
        # Keras numbers layers without a name by what else was built before: the number here is the architecture's.
        name = f"{number:03}_{layer.__class__.__name__}"
        if layer.__class__.__name__ == "BatchNormalization":
            yield f"{name}/beta", layer.beta
        else:
            yield from ((f"{name}/{variable.name}", variable) for variable in layer.weights)


def fill_folded(model: Any, named: dict[str, NDArray[np.float32]]) -> None:
    """Puts weights as they lie in an ONNX file (`as_in_onnx`) into a network that was just built.

    Raises `KeyError` for weights that are missing, and `ValueError` for some of another shape.
    """
    for layer in _layers(model):
        if layer.__class__.__name__ == "BatchNormalization":
            ones = np.ones(layer.gamma.shape, np.float32)
            layer.set_weights([ones, 0 * ones, 0 * ones, (1 - layer.epsilon) * ones])
    for name, variable in _named_variables(model):
        variable.assign(from_onnx(np.asarray(named[name], np.float32), tuple(variable.shape)))


def as_in_onnx(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights as ONNX lays them out: kernels (out, in, h, w), depthwise (channel, 1, h, w), the rest as in Keras."""
    if values.ndim != 4:
        return values
    # Keras: (h, w, in, out), and depthwise (h, w, channel, 1).
    return values.transpose((2, 3, 0, 1) if values.shape[3] == 1 else (3, 2, 0, 1))


def from_onnx(values: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights as Keras lays them out, for a variable of that shape: the way back from `as_in_onnx`."""
    if len(shape) != 4:
        return values.reshape(shape)
    return values.transpose((2, 3, 0, 1) if shape[3] == 1 else (2, 3, 1, 0)).reshape(shape)


BUILDERS: dict[str, Callable[[int | None], Any]] = {
    "xception": build_xception,
    "compact": build_compact,
    "efficientnet-lite0": build_efficientnet_lite0,
}
