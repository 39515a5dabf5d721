"""Encoded pictures inside a graph: what they are and how large is read off their first bytes, then they are decoded."""

import tensorflow as tf

# A picture of a one-colour square compresses a thousandfold: without a bound a megabyte is decoded to gigabytes. This
# is more than cameras of 24 or 32 megapixels take, and 100 MB once it is decoded.
MOST_PIXELS = 2**25
_PNG, _JPEG, _GIF, _BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM"
_HEAD = 32
# Of 255 bytes as all encoders write them: 8 MB. It takes 10 microseconds to step over one.
_MOST_GIF_PIECES = 2**15


def decoded(contents: tf.Tensor, height: int, width: int, channels: int) -> tf.Tensor:
    """One encoded picture (PNG, JPEG, BMP, or the first frame of a GIF) as uint8 of the given size.

    Args:
        contents: scalar string.
        height, width: of the result; other pictures are resized, with smoothing.
        channels: 1, 3 or 4.

    Returns:
        Shape `(height, width, channels)`. At run time `InvalidArgumentError` for what is no such picture, is cut off,
        or has more than `MOST_PIXELS` pixels; that before it is decoded.
    """
    head = _bytes(contents, _HEAD)
    png, jpeg, gif, bmp = (_begins(contents, magic) for magic in (_PNG, _JPEG, _GIF, _BMP))
    is_picture = tf.raw_ops.Assert(
        condition=png | jpeg | gif | bmp,
        data=["Encoded pictures must be PNG, JPEG, GIF or BMP. Received: one that begins with the bytes", head[:8]],
        summarize=8,
    )
    in_png = tf.stack([_number(head[20:24], little=False), _number(head[16:20], little=False)])
    in_bmp = tf.stack([_absolute(_number(head[22:26])), _number(head[18:22])])
    with tf.control_dependencies([is_picture]):
        size, contents = tf.case(
            [
                (jpeg, lambda: (tf.image.extract_jpeg_shape(contents, tf.int64)[:2], contents)),
                (png, lambda: (in_png, contents)),
                (gif, lambda: _gif(contents)),
            ],
            default=lambda: (in_bmp, contents),
        )
    height_there, width_there = tf.unstack(tf.ensure_shape(size, [2]))
    # Divided, as the product of two numbers of 32 bits may be more than int64 holds.
    fits = (height_there > 0) & (width_there > 0) & (width_there <= MOST_PIXELS // tf.maximum(height_there, 1))
    is_bounded = tf.raw_ops.Assert(
        condition=fits,
        data=[
            f"Encoded pictures must have from 1 to {MOST_PIXELS} pixels. Received: width",
            width_there,
            "and height",
            height_there,
        ],
    )
    with tf.control_dependencies([is_bounded]):
        contents = tf.identity(contents)
    picture = tf.case([(jpeg, lambda: _from_jpeg(contents, channels))], default=lambda: _from_any(contents, channels))
    picture = tf.image.resize(picture, (height, width), antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(picture, 0.0, 255.0)), tf.uint8)


def _from_any(contents: tf.Tensor, channels: int) -> tf.Tensor:
    return tf.io.decode_image(contents, channels=channels, expand_animations=False)


def _from_jpeg(contents: tf.Tensor, channels: int) -> tf.Tensor:
    """As other decoders do it, Pillow's among them: TensorFlow's default is up to 6 levels off."""
    if channels == 4:  # No JPEG has an alpha channel, and the error that says so comes at run time.
        return _from_any(contents, channels)
    return tf.io.decode_jpeg(contents, channels=channels, dct_method="INTEGER_ACCURATE")


def _begins(contents: tf.Tensor, magic: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(contents, 0, len(magic)), magic)


def _bytes(contents: tf.Tensor, count: int) -> tf.Tensor:
    """The first bytes as int64; zeros where `contents` has ended."""
    head = tf.strings.join([tf.strings.substr(contents, 0, count), b"\0" * count])
    return tf.ensure_shape(tf.cast(tf.io.decode_raw(tf.strings.substr(head, 0, count), tf.uint8), tf.int64), [count])


def _number(part: tf.Tensor, little: bool = True) -> tf.Tensor:
    """The unsigned number that some bytes write."""
    powers = [256**i for i in range(part.shape[0])]
    return tf.reduce_sum(part * tf.constant(powers if little else powers[::-1], tf.int64))


def _absolute(number: tf.Tensor) -> tf.Tensor:
    """Of 32 bits with a sign: a BMP that is stored from the top has a negative height."""
    return tf.minimum(number, 2**32 - number)


def _gif(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width of a GIF's first frame, and the GIF with that frame alone: a decoder takes all frames at once.

    A GIF is a header of 13 bytes, a table of colours where bit 7 of byte 10 says so, and blocks: extensions (0x21) and
    frames (0x2C), these with a table of their own, each of pieces with their length before them and an empty one last.
    """
    length = tf.strings.length(contents)
    data = tf.concat([tf.cast(tf.io.decode_raw(contents, tf.uint8), tf.int32), tf.zeros([_HEAD], tf.int32)], 0)

    def byte(at: tf.Tensor) -> tf.Tensor:
        return data[tf.minimum(at, length)]

    def after_table(at: tf.Tensor, flags: tf.Tensor) -> tf.Tensor:
        return at + tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    def after_pieces(at: tf.Tensor) -> tf.Tensor:
        (end,) = tf.while_loop(
            lambda at: byte(at) > 0, lambda at: (at + 1 + byte(at),), (at,), maximum_iterations=_MOST_GIF_PIECES
        )
        return end + 1

    (frame,) = tf.while_loop(
        lambda at: tf.equal(byte(at), 0x21),
        lambda at: (after_pieces(at + 2),),
        (after_table(tf.constant(13), data[10]),),
        maximum_iterations=_HEAD,
    )
    is_frame = tf.equal(byte(frame), 0x2C)
    width, height = (byte(frame + at) + 256 * byte(frame + at + 1) for at in (5, 7))
    end = after_pieces(after_table(frame + 10, byte(frame + 9)) + 1)
    size = tf.where(is_frame, tf.stack([height, width]), 0)
    return tf.cast(size, tf.int64), tf.strings.join([tf.strings.substr(contents, 0, end), b";"])
