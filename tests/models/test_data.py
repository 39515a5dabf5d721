"""Where the images come from, what they must look like, and the order in which training sees them."""

import gzip
import importlib
import subprocess

import keras
import numpy as np
import pytest

from models import data


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def small_arrays():
    draw = np.random.default_rng(0)
    return {
        "x_train": draw.integers(0, 256, (20, 28, 28), np.uint8),
        "y_train": draw.integers(0, 10, 20, np.uint8),
        "x_test": draw.integers(0, 256, (5, 28, 28), np.uint8),
        "y_test": draw.integers(0, 10, 5, np.uint8),
    }


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files_is_read(tmp_path, small_arrays, suffix):
    for name, stem in data._IDX_NAMES.items():
        write_idx(tmp_path / f"{stem}{suffix}", small_arrays[name])
    loaded = data.load(tmp_path)
    np.testing.assert_array_equal(loaded.x_train[..., 0], small_arrays["x_train"] / np.float32(255))
    np.testing.assert_array_equal(loaded.y_test, small_arrays["y_test"])
    assert (loaded.x_test.dtype, loaded.y_train.dtype) == (np.float32, np.int32)


def test_an_npz_file_is_read_and_what_was_used_is_printed(tmp_path, small_arrays, capsys):
    np.savez(tmp_path / "mine.npz", **small_arrays)
    loaded = data.load(tmp_path / "mine.npz")
    np.testing.assert_array_equal(loaded.x_test[..., 0], small_arrays["x_test"] / np.float32(255))
    assert capsys.readouterr().err == f"Data: 20 training and 5 test images from {tmp_path / 'mine.npz'}\n"


def test_floating_images_keep_their_values(tmp_path, small_arrays):
    floating = small_arrays["x_train"] / 255.0
    np.savez(tmp_path / "mine.npz", **{**small_arrays, "x_train": floating})
    np.testing.assert_array_equal(data.load(tmp_path / "mine.npz").x_train[..., 0], floating.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("x_train", np.zeros((20, 32, 32), np.uint8), r"must have shape .* Received: \(20, 32, 32\)"),
        ("x_train", np.full((20, 28, 28), 255.0), r"must be uint8, or floating in \[0, 1\]"),
        ("x_test", np.full((5, 28, 28), np.nan), r"must be uint8, or floating in \[0, 1\]"),
        ("y_train", np.full(20, 10), "Received: 10 to 10"),
        ("y_train", np.zeros(20), r"must be integers of shape \(n,\)"),
        ("y_test", np.zeros(4, int), "one label for each test image. Received: 5, 4"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, small_arrays, name, array, message):
    np.savez(tmp_path / "mine.npz", **{**small_arrays, name: array})
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "mine.npz")


def test_an_npz_file_that_lacks_arrays_is_refused(tmp_path, small_arrays):
    np.savez(tmp_path / "mine.npz", x_train=small_arrays["x_train"])
    with pytest.raises(ValueError, match="Missing: x_test, y_test, y_train"):
        data.load(tmp_path / "mine.npz")


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(tmp_path / "nowhere")


def test_a_folder_that_lacks_a_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="Missing: train-images-idx3-ubyte"):
        data.load(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("hello")
    with pytest.raises(ValueError, match="must be a folder with IDX files"):
        data.load(tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, world", "is not an IDX file"),
        (b"", "is not an IDX file"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]), r"is cut off: 2 values where its header says \[9\]"),
    ],
)
def test_a_broken_idx_file_is_refused(tmp_path, small_arrays, content, message):
    for name, stem in data._IDX_NAMES.items():
        write_idx(tmp_path / stem, small_arrays[name])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


def test_where_no_images_can_be_had_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(data, "INSTALLED", tmp_path / "a")
    monkeypatch.setattr(data, "UNPACKED", tmp_path / "b")
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", offline)
    with pytest.raises(FileNotFoundError, match=r"make data.*apt-get install dataset-fashion-mnist.*URL fetch failure"):
        data.load()


def test_the_command_ends_with_one_line_and_a_code_where_the_data_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        data.main(["--data", str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_fashion_mnist_is_whole(fashion_mnist):
    assert fashion_mnist.x_train.shape == (60_000, 28, 28, 1)
    assert fashion_mnist.x_test.shape == (10_000, 28, 28, 1)
    assert np.bincount(fashion_mnist.y_train).tolist() == [6_000] * 10
    assert np.bincount(fashion_mnist.y_test).tolist() == [1_000] * 10
    assert (fashion_mnist.x_train.min(), fashion_mnist.x_train.max()) == (0, 1)


def batches(count, **options):
    numbers = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    dataset = data.training_batches(numbers, np.arange(10), 3, **options)
    return [(x.numpy().ravel().tolist(), y.numpy().tolist()) for x, y in dataset.take(count)]


def test_an_epoch_holds_every_image_at_most_once_beside_its_label():
    epoch = batches(3, seed=1)
    assert len({x for images, _ in epoch for x in images}) == 9
    assert all(images == labels for images, labels in epoch)


def test_epochs_differ_in_order_and_so_do_seeds():
    two_epochs = batches(6, seed=1)
    assert two_epochs[:3] != two_epochs[3:]
    assert two_epochs[:3] != batches(3, seed=2)


def test_batches_of_a_later_epoch_do_not_depend_on_where_training_began():
    assert batches(6, seed=1, first_epoch=1) == batches(9, seed=1)[3:]


def test_augmentation_has_a_seed_of_its_own_in_every_batch_and_the_same_one_when_taken_up_again():
    def seed_as_image(images, seed):
        return images * 0 + np.float32(1) * keras.ops.cast(seed[1], "float32")

    steps = [images[0] for images, _ in batches(6, seed=1, augment=seed_as_image)]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert [images[0] for images, _ in batches(3, seed=1, first_epoch=1, augment=seed_as_image)] == [3, 4, 5]


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"`batch_size` must be in \[1, 10\].* Received: {batch_size}"):
        data.training_batches(np.zeros((10, 28, 28, 1)), np.zeros(10), batch_size, seed=0)


@pytest.mark.parametrize(
    "command",
    [
        "models.train",
        "models.train --strategy mirrored",
        "models.train --strategy workers --local_workers 2",
        "models.experiments.__main__ drift --quick",
        "models.pretrained.__main__ evaluate",
        "models.pretrained.__main__ make run",
    ],
)
def test_commands_look_at_their_data_before_all_that_takes_long(command, tmp_path, monkeypatch, capsys):
    module, *flags = command.split()
    program = importlib.import_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "start_tensorflow", lambda: pytest.fail("work has begun"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("workers have been started"))
    np.savez("few.npz", x_train=np.zeros((2, 28, 28), np.uint8))
    for given, said in {"nowhere": "must be a folder or an .npz file", "few.npz": "Missing: x_test, y_test"}.items():
        with pytest.raises(SystemExit) as ended:
            program.main([*flags, "--data", given])
        assert ended.value.code == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["few.npz"]
