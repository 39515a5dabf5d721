"""The network that is shipped: how its files are made, what its card says, and what a server loads."""

import asyncio
import dataclasses
import json
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.client import AsyncClient, Client
from PIL import Image

import keras_bn
from models import data, pretrained, train
from models.data import ImageData
from models.pretrained import __main__ as command
from models.pretrained import evaluation, making
from models.settings import Settings
from models.training import train as run_training
from tests.serving.servers import running_server
from tests.sessions import assert_served_in_batches, plain_session

SETTINGS = Settings(width=2, epochs=1, batch_size=50, training_images=300, seed=3)


@pytest.fixture(scope="module")
def images(fashion_mnist):
    part = {name: getattr(fashion_mnist, name)[:500] for name in ("x_train", "y_train", "x_test", "y_test")}
    return ImageData(**part, origin="a few of Fashion-MNIST")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run_training(SETTINGS, images, folder), folder


@pytest.fixture(scope="module")
def made(images, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    making.make(trained[1], images, folder, "a machine")
    return folder


@pytest.fixture(scope="module")
def saved_image_data(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, **{name: getattr(images, name) for name in ("x_train", "y_train", "x_test", "y_test")})
    return path


def test_the_shipped_network_has_the_accuracy_of_its_card(fashion_mnist):
    numbers = evaluation.evaluate(pretrained.load(), fashion_mnist)
    assert numbers["test_images"] == 10_000
    assert evaluation.differences(numbers, pretrained.load_card()) == []
    assert numbers["accuracy"] >= 0.94


def test_the_shipped_network_is_small_and_its_card_complete():
    assert (pretrained.FOLDER / pretrained.NETWORK).stat().st_size <= 2_000_000
    for name in ("README.md", "confusion.png", "curve.png", "log.csv", "settings.json"):
        assert (pretrained.FOLDER / name).stat().st_size


def test_the_shipped_network_holds_no_arguments_that_the_oldest_keras_does_not_know():
    with zipfile.ZipFile(pretrained.FOLDER / pretrained.NETWORK) as archive:
        config = archive.read("config.json").decode()
    assert [name for name in making.NEW_ARGUMENTS if f'"{name}"' in config] == []


def test_the_numbers_are_those_of_counting_answers_one_by_one(images, made):
    model = pretrained.load(made)
    card = pretrained.load_card(made)
    answers = [int(np.argmax(row)) for row in model(images.x_test).numpy()]
    right = [answer == label for answer, label in zip(answers, images.y_test, strict=True)]
    assert card["accuracy"] == round(sum(right) / 500, 4)
    shirts = [hit for hit, label in zip(right, images.y_test, strict=True) if label == 6]
    assert card["accuracy_per_class"]["Shirt"] == round(sum(shirts) / len(shirts), 4)
    for label, answer in ((6, 0), (0, 6), (9, 9)):
        pairs = zip(images.y_test, answers, strict=True)
        assert card["confusion"][label][answer] == sum(pair == (label, answer) for pair in pairs)


def test_the_statistics_are_those_of_the_training_images_as_they_are(images, trained, made):
    # In front of the first normalization stands a convolution alone: an oracle without any normalization.
    model, _ = trained
    convolved = model.get_layer("block_1_conv")(images.x_train[:300]).numpy().astype(np.float64)
    ours = pretrained.load(made).get_layer("block_1_bn")
    np.testing.assert_allclose(ours.moving_mean, convolved.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, convolved.var(axis=(0, 1, 2)), rtol=1e-4)
    assert np.abs(np.subtract(ours.moving_mean, model.get_layer("block_1_bn").moving_mean)).max() > 1e-3


def test_the_statistics_of_a_training_with_augmentation_are_those_of_augmented_images(images):
    plain = making.population(Settings(), images.x_train)
    np.testing.assert_array_equal(plain, images.x_train)
    settings = Settings(augment=True, erase=8, seed=5)
    changed = making.population(settings, images.x_train)
    assert changed.shape == images.x_train.shape
    # An erased square takes light away.
    assert changed.mean() < 0.99 * images.x_train.mean()
    np.testing.assert_array_equal(changed, making.population(settings, images.x_train))


def test_the_shipped_files_can_be_made_anew_without_their_training(images, made, tmp_path):
    for path in made.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    card = making.remake(images, tmp_path)
    before = pretrained.load_card(made)
    assert {name: card[name] for name in making.FACTS} == {name: before[name] for name in making.FACTS}
    assert card["accuracy"] == before["accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in made.iterdir())


def test_the_file_holds_no_state_of_the_optimizer(made, tmp_path):
    with zipfile.ZipFile(made / pretrained.NETWORK) as archive:
        archive.extract("model.weights.h5", tmp_path)
        assert json.loads(archive.read("config.json"))["compile_config"] == {}
    with h5py.File(tmp_path / "model.weights.h5") as weights:
        assert "optimizer" not in weights


@pytest.mark.parametrize("settings", [SETTINGS, Settings(epochs=40, augment=True, erase=8, weight_decay=0.05)])
def test_the_recorded_command_gives_the_settings_of_the_training(settings):
    program, flags = making.training_command(settings).split(" --", 1)
    assert program == "python -m models.train"
    flags = vars(train.flag_parser().parse_args(f"--{flags}".split()))
    assert Settings(**{field.name: flags[field.name] for field in dataclasses.fields(Settings)}) == settings


def test_the_page_names_what_a_person_asks_for(made):
    page, card = (made / "README.md").read_text(), pretrained.load_card(made)
    for said in (
        card["command"],
        f"{card['accuracy']:.4f}",
        f"{card['accuracy_before_recalibration']:.4f}",
        "seed | 3",
    ):
        assert said in page
    assert all(f"| {name} |" in page for name in data.CLASS_NAMES)
    for name in ("confusion.png", "curve.png"):
        assert name in page
        with Image.open(made / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_the_examples_are_the_first_test_image_of_each_class(images, made):
    examples = pretrained.load_examples(made)
    first = [np.flatnonzero(images.y_test == label)[0] for label in range(10)]
    np.testing.assert_array_equal(pretrained.preprocess(examples), images.x_test[first])


def test_a_card_with_another_number_is_refused(made, saved_image_data, capsys):
    flags = ["evaluate", "--folder", str(made), "--data", str(saved_image_data)]
    command.main(flags)
    assert capsys.readouterr().out.endswith("As the card says.\n")
    card = pretrained.load_card(made)
    numbers = {name: card[name] for name in ("accuracy", "test_images", "accuracy_per_class", "confusion")}
    assert evaluation.differences(numbers, card) == []
    assert evaluation.differences(numbers, card | {"accuracy": card["accuracy"] + 0.002})
    assert evaluation.differences(numbers, card | {"test_images": 499})
    others = card["accuracy_per_class"] | {"Bag": card["accuracy_per_class"]["Bag"] - 0.02}
    assert evaluation.differences(numbers, card | {"accuracy_per_class": others})
    assert evaluation.differences(numbers, card | {"confusion": np.roll(card["confusion"], 1, axis=1).tolist()})


def test_a_training_on_other_images_is_refused(images, trained, tmp_path):
    others = dataclasses.replace(images, x_train=1 - images.x_train)
    with pytest.raises(ValueError, match=r"was trained on other images than .* a few of Fashion-MNIST"):
        making.make(trained[1], others, tmp_path, "a machine")
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_is_not_finished_is_refused(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold a finished training with its model\.keras"):
        making.make(tmp_path, images, tmp_path, "a machine")


def test_a_network_that_is_too_large_leaves_no_file(images, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match=r"must fit into 1,000 bytes\. Received: \d+"):
        making.make(trained[1], images, tmp_path, "a machine")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """The shipped network where it is there, exported by the command as the image's build does it."""
    base = tmp_path_factory.mktemp("models") / "fashion_cnn"
    folder = pretrained.FOLDER if (pretrained.FOLDER / pretrained.NETWORK).exists() else made
    command.main(["export", str(base), "--version", "1", "--folder", str(folder)])
    return base / "1", pretrained.load_examples(folder), pretrained.load(folder)


def test_a_plain_session_the_embedded_server_and_the_network_answer_the_same(exported):
    version, examples, network = exported
    encoded = np.array([tf.io.encode_png(one).numpy() for one in examples], object)
    with plain_session(version) as run:
        answers = run("serving_default", {"image": examples})
        of_bytes = run("image_bytes", {"image_bytes": encoded})
    np.testing.assert_allclose(answers["probabilities"], network(pretrained.preprocess(examples)), atol=1e-5)
    np.testing.assert_array_equal(of_bytes["probabilities"], answers["probabilities"])
    flags = ("--model_name=fashion_cnn", f"--model_base_path={version.parent}")
    with running_server(*flags) as server, Client(server.url) as client:
        served = client.predict("fashion_cnn", examples)
    np.testing.assert_allclose(served["probabilities"], answers["probabilities"], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(served["top_labels"], answers["top_labels"])


def test_the_warm_up_requests_parse_and_run_in_a_plain_session(exported):
    from tensorflow_serving.apis import prediction_log_pb2

    version, *_ = exported
    records = tf.data.TFRecordDataset(str(version / "assets.extra/tf_serving_warmup_requests"))
    requests = [prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request for record in records]
    assert {request.model_spec.name for request in requests} == {"fashion_cnn"}
    signatures = [request.model_spec.signature_name for request in requests]
    assert sorted(set(signatures)) == ["batch_norm_drift", "image_bytes", "serving_default"]
    with plain_session(version) as run:
        for request in requests:
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            for value in run(request.model_spec.signature_name, inputs).values():
                assert len(value)


def test_requests_of_1_to_64_rows_may_run_together_on_every_signature(exported):
    version, examples, _ = exported
    encoded = np.array([tf.io.encode_png(one).numpy() for one in examples], object)
    inputs = {"serving_default": {"image": examples}, "batch_norm_drift": {"image": examples}}
    assert_served_in_batches(version, {**inputs, "image_bytes": {"image_bytes": encoded}})


def test_the_client_pools_the_drift_of_its_examples_over_both_protocols(exported):
    version, examples, network = exported
    expected = keras_bn.drift(network, pretrained.preprocess(examples))

    async def ask_with_others(url):
        async with AsyncClient(url) as client:
            return await client.drift("fashion_cnn", {"image": examples}, batch_size=4)

    with running_server("--model_name=fashion_cnn", f"--model_base_path={version.parent}") as server:
        answers = [keras_bn.drift(version, examples, batch_size=3)]
        for url in (server.url, f"grpc://{server.grpc_target}"):
            with Client(url) as client:
                answers.append(client.drift("fashion_cnn", examples, batch_size=3))
                with pytest.raises(ValueError, match=r"`inputs` must have one example at least.*\[0\] examples"):
                    client.drift("fashion_cnn", examples[:0])
            answers.append(asyncio.run(ask_with_others(url)))
    for answer in answers:
        assert [row["layer"] for row in answer] == [row["layer"] for row in expected]
        for row, other in zip(answer, expected, strict=True):
            for name in ("mean_shift", "variance_ratio", "kl"):
                assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
