"""The settings of a training run, each with its help text."""

import dataclasses
import math
from collections.abc import Callable

NETWORK_NAMES = ("fashion_cnn", "resnet", "sigmoid_mlp")

# No comparison holds for NaN.
_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "width": ("at least 1", lambda value: value >= 1),
    "epochs": ("at least 1", lambda value: value >= 1),
    "batch_size": ("at least 1", lambda value: value >= 1),
    "learning_rate": ("finite and above 0", lambda value: 0 < value < math.inf),
    "weight_decay": ("finite and at least 0", lambda value: 0 <= value < math.inf),
    "label_smoothing": ("in [0, 1)", lambda value: 0 <= value < 1),
    "erase": ("at least 0", lambda value: value >= 0),
    "validation_images": ("at least 0", lambda value: value >= 0),
    "training_images": ("at least 1", lambda value: value >= 1),
    "seed": (f"in [0, {2**31})", lambda value: 0 <= value < 2**31),
}


def _setting(default, help_text: str, **options):
    return dataclasses.field(default=default, metadata={"help": help_text, **options})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training run is made from: the flags of `python -m models.train`, which explains each.

    Raises:
        ValueError: A setting is out of its range.
    """

    network: str = _setting("fashion_cnn", "which network of models.networks", choices=NETWORK_NAMES)
    width: int | None = _setting(None, "channels of its first layer; by default the network's own", type=int)
    epochs: int = _setting(5, "passes over the training images", type=int)
    batch_size: int = _setting(128, "images in a batch", type=int)
    learning_rate: float = _setting(
        3e-3, "the highest: a tenth of the steps rises to it, a cosine falls to 0", type=float
    )
    weight_decay: float = _setting(0.01, "of AdamW", type=float)
    label_smoothing: float = _setting(0.0, "share of each label that is spread over all classes, in [0, 1)", type=float)
    augment: bool = _setting(False, "flip and shift the training images at random", action="store_true")
    erase: int = _setting(0, "with --augment: side in pixels of a square that is erased at random", type=int)
    validation_images: int = _setting(0, "hold out so many training images and report on them each epoch", type=int)
    training_images: int | None = _setting(None, "use only so many training images, for a quick trial", type=int)
    recalibrate: bool = _setting(
        False, "in the end, replace moving statistics by those of all training images", action="store_true"
    )
    seed: int = _setting(0, "of the weights, the order and the augmentation", type=int)

    def __post_init__(self):
        for name, (allowed, fits) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value}")
        if self.network not in NETWORK_NAMES:
            raise ValueError(f"`network` must be one of {', '.join(NETWORK_NAMES)}. Received: network={self.network}")
        if self.erase and not self.augment:
            raise ValueError(f"`erase` needs `augment`. Received: erase={self.erase}, augment={self.augment}")

    def used_images(self, count: int) -> int:
        """How many of so many training images are trained on.

        Raises:
            ValueError: There are too few.
        """
        available = count - self.validation_images
        if available < self.batch_size:
            raise ValueError(
                f"`validation_images` must leave a batch of {self.batch_size} of the {count} training images. "
                f"Received: validation_images={self.validation_images}"
            )
        used = available if self.training_images is None else self.training_images
        if not self.batch_size <= used <= available:
            raise ValueError(
                f"`training_images` must be from {self.batch_size}, a batch, to {available}, what there is less "
                f"{self.validation_images} held out. Received: training_images={used}"
            )
        return used

    def flags(self) -> list[str]:
        """The words after `python -m models.train` that make these settings: what differs from the defaults."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
        return words
