"""export(): encoded pictures of every kind, and those that a server must not decode."""

import io
import struct
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn.exporting import pictures
from keras_bn.exporting.pictures import MOST_PIXELS
from tests.sessions import plain_session

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """What the model sees of pictures: their mean colour, and the mean of the left half."""
    x = keras.Input((8, 8, 3), name="image")
    y = keras.layers.Concatenate()(
        [keras.layers.GlobalAveragePooling2D()(part) for part in (x, keras.layers.Cropping2D(((0, 0), (0, 4)))(x))]
    )
    version = keras_bn.export(keras.Model(x, y), tmp_path_factory.mktemp("m"), preprocess=lambda p: p, fold=False).path
    with plain_session(version) as run:

        def ask(*files):
            return run("image_bytes", {"image_bytes": np.array(files, object)})["outputs"]

        yield ask


def pixels(seed=0):
    """A smooth coloured picture of 48 by 64."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), "uint8")
    return np.asarray(Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC))


def encoded(kind, seed=0, **options):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, kind, **options)
    return file.getvalue()


def animated(*seeds):
    frames = [Image.fromarray(pixels(seed)) for seed in seeds]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
    return file.getvalue()


def seen(picture):
    small = tf.image.resize(picture[None].astype("float32"), (8, 8), antialias=True).numpy()
    return np.concatenate([small.mean((1, 2)), small[:, :, :4].mean((1, 2))], -1)[0]


KINDS = {
    "png": (lambda: encoded("PNG"), 1.0),
    "jpeg": (lambda: encoded("JPEG", quality=95), 4.0),
    "progressive jpeg": (lambda: encoded("JPEG", quality=95, progressive=True), 4.0),
    "bmp": (lambda: encoded("BMP"), 1.0),
    "gif": (lambda: encoded("GIF"), 12.0),
    "animated gif": (lambda: animated(0, 1, 2), 12.0),
}


def test_every_kind_is_decoded_several_at_once(ask):
    answers = ask(*(make() for make, _ in KINDS.values()))
    for answer, (_, tolerance) in zip(answers, KINDS.values(), strict=True):
        np.testing.assert_allclose(answer, seen(pixels()), atol=tolerance)


def test_of_an_animated_gif_the_first_frame_counts(ask):
    np.testing.assert_array_equal(ask(animated(0, 1, 2)), ask(animated(0, 3)))
    assert np.abs(ask(animated(0, 1)) - ask(animated(1, 0))).max() > 12


def test_a_bmp_stored_from_the_top_is_decoded(ask):
    file = bytearray(encoded("BMP"))
    file[22:26] = struct.pack("<i", -48)
    flipped = pixels()[::-1]
    np.testing.assert_allclose(ask(bytes(file))[0], seen(flipped), atol=1)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def one_colour_png(width, height):
    """A whole and valid PNG of one bit a pixel, a thousandth of what it decodes to."""
    rows = zlib.compress((b"\0" * (1 + (width + 7) // 8)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def edited(file, at, data):
    return file[:at] + data + file[at + len(data) :]


def jpeg_of_size(width, height):
    file = encoded("JPEG")
    return edited(file, file.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def gif_of_size(width, height):
    file = encoded("GIF")
    return edited(file, file.index(b"\x2c\0\0\0\0") + 5, struct.pack("<HH", width, height))


HUGE = {
    "png": lambda: one_colour_png(2**15, 2**14),
    "png just above": lambda: one_colour_png(2**13 + 1, 2**12),
    "png of 2**62 pixels": lambda: edited(encoded("PNG"), 16, struct.pack(">II", 2**31 - 1, 2**31 - 1)),
    "jpeg": lambda: jpeg_of_size(65000, 65001),
    "gif": lambda: gif_of_size(65000, 65001),
    "bmp": lambda: edited(encoded("BMP"), 18, struct.pack("<ii", 65000, 65001)),
    "bmp from the top": lambda: edited(encoded("BMP"), 18, struct.pack("<ii", 65000, -65001)),
}


def refusal(ask, file):
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        ask(encoded("PNG"), file)
    return str(caught.value)


@pytest.mark.parametrize("kind", HUGE)
def test_a_picture_of_too_many_pixels_is_refused_with_its_size(kind, ask):
    said = refusal(ask, HUGE[kind]())
    assert f"must have from 1 to {MOST_PIXELS} pixels. Received: width" in said
    sizes = {"png": "[32768] [and height] [16384]", "png just above": "[8193] [and height] [4096]"}
    sizes["png of 2**62 pixels"] = "[2147483647] [and height] [2147483647]"
    assert sizes.get(kind, "[65000] [and height] [65001]") in said


def test_as_many_pixels_as_are_allowed_are_decoded(ask):
    np.testing.assert_array_equal(ask(one_colour_png(2**13, 2**12)), np.zeros((1, 6)))


@pytest.mark.parametrize("file", [b"", b"hello", b"RIFF\0\0\0\0WEBPVP8 ", b"\0" * 100])
def test_what_is_no_picture_is_called_so(file, ask):
    assert "Encoded pictures must be PNG, JPEG, GIF or BMP. Received: one that begins with the bytes" in refusal(
        ask, file
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_picture_that_is_cut_off_is_refused(kind, share, ask):
    file = encoded("GIF") if kind == "animated gif" else KINDS[kind][0]()
    assert refusal(ask, file[: max(12, int(len(file) * share))])


def test_a_gif_of_nothing_but_small_pieces_comes_to_an_end(ask):
    file = b"GIF89a\x10\0\x10\0\0\0\0" + b"\x21\xfe" + b"\1x" * 200_000
    assert "must have from 1 to" in refusal(ask, file)


@pytest.mark.parametrize("options", [{}, {"quality": 60}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(options):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), "uint8")
    file = io.BytesIO()
    Image.fromarray(noise // 2 + pixels() // 2).save(file, "JPEG", **options)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ours = session.run(pictures.decoded(tf.constant(file.getvalue()), 48, 64, 3))
    np.testing.assert_array_equal(ours, np.asarray(Image.open(file)))
