from __future__ import annotations

import pytest

from common.domain import MaskwatchError
from workers.training import recipes
from workers.training.recipes import Recipe, Stage


def test_the_notebooks_recipe_is_the_reference():
    settings = recipes.settings_for(Recipe.NOTEBOOK, "xception")
    assert settings.stages == (Stage(128, 2),)
    assert (settings.batch, settings.learning_rate, settings.seed, settings.patience) == (32, 1e-4, 42, None)


def test_its_rate_decays_as_old_keras_did():
    keras = pytest.importorskip("keras", reason="the `train` layer is not installed")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation="softmax")])
    recipes.compile_model(model, recipes.settings_for(Recipe.NOTEBOOK, "xception"), steps=100)
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert model.loss == "sparse_categorical_crossentropy"
    rate = model.optimizer._learning_rate
    for step in (0, 1, 454):
        assert float(rate(step)) == pytest.approx(1e-4 / (1 + 1e-4 / 2 * step), rel=1e-6)


def test_the_rate_of_field_warms_up_and_falls():
    keras = pytest.importorskip("keras", reason="the `train` layer is not installed")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation="softmax")])
    settings = recipes.settings_for(Recipe.FIELD, "compact")
    recipes.compile_model(model, settings, steps=10)
    rate = [float(model.optimizer._learning_rate(step)) for step in (0, 20, 225, 450)]
    assert rate[1] == pytest.approx(settings.learning_rate)
    assert rate[0] < rate[1] > rate[2] > rate[3] > 0


@pytest.mark.parametrize("arch", recipes.FIELD)
def test_every_network_has_a_builder_and_settings(arch):
    from workers.classification import networks

    assert arch in networks.BUILDERS
    assert recipes.FIELD[arch].arch == arch


def test_stages_tell_the_side_of_every_epoch():
    settings = recipes.with_stages(recipes.FIELD["xception"], recipes.read_stages("64:2,96:1"), None)
    assert [settings.side_in(epoch) for epoch in range(3)] == [64, 64, 96]
    assert (settings.epochs, settings.side) == (3, 96)


@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 18, 40])
def test_epochs_are_shared_out_and_the_last_size_stays(epochs):
    settings = recipes.FIELD["xception"]
    shared = recipes.with_stages(settings, None, epochs)
    assert shared.epochs == epochs
    assert shared.side == settings.side


@pytest.mark.parametrize("text", ["64", "64:", "x:3", "64:3,", "64:3:1"])
def test_stages_that_cannot_be_read_are_an_error(text):
    with pytest.raises(MaskwatchError, match="valid: SIDE:EPOCHS"):
        recipes.read_stages(text)


@pytest.mark.parametrize("text", ["64:0", "8:2", "900:1"])
def test_stages_out_of_range_are_an_error(text):
    with pytest.raises(MaskwatchError, match="sides from 32 to 256"):
        recipes.with_stages(recipes.FIELD["compact"], recipes.read_stages(text), None)


def test_an_unknown_network_is_an_error():
    with pytest.raises(MaskwatchError, match="unknown architecture 'vgg'; known: compact"):
        recipes.settings_for(Recipe.FIELD, "vgg")
