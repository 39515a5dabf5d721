"""The numbers of the card: accuracy, accuracy of each class, and which classes are taken for which."""

import keras
import numpy as np

from models import data


def evaluate(model: keras.Model, images: data.ImageData) -> dict:
    """Classify all test images.

    Args:
        model: A network that gives probabilities of shape `(batch, 10)`.
        images: The data.

    Returns:
        `accuracy`; `test_images`, their number; `accuracy_per_class`, by the names of the classes; and `confusion`,
        counts whose rows are labels and whose columns are answers.
    """
    answers = model.predict(images.x_test, batch_size=500, verbose=0).argmax(axis=-1)
    confusion = np.zeros((len(data.CLASS_NAMES), len(data.CLASS_NAMES)), np.int64)
    np.add.at(confusion, (images.y_test, answers), 1)
    per_class = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    return {
        "accuracy": round(float(np.mean(answers == images.y_test)), 4),
        "test_images": len(answers),
        "accuracy_per_class": {
            name: round(float(one), 4) for name, one in zip(data.CLASS_NAMES, per_class, strict=True)
        },
        "confusion": confusion.tolist(),
    }


def differences(numbers: dict, card: dict, tolerance: float = 1e-3) -> list[str]:
    """Where numbers that were computed anew are not those of the card.

    Args:
        numbers: From `evaluate`.
        card: From `models.pretrained.load_card`.
        tolerance: The largest difference of an accuracy that passes; another processor may round an image at the
            border between two classes to the other side.

    Returns:
        A line for each difference; none where they agree.
    """
    found = []
    if numbers["test_images"] != card["test_images"]:
        found.append(f"test images: {numbers['test_images']}, card {card['test_images']}")
    pairs = {"accuracy": (numbers["accuracy"], card["accuracy"], tolerance)}
    for name, one in numbers["accuracy_per_class"].items():
        # A tenth of the images: an image more or less weighs ten times as much.
        pairs[name] = (one, card["accuracy_per_class"][name], 10 * tolerance)
    found += [
        f"{name}: {ours}, card {theirs}" for name, (ours, theirs, most) in pairs.items() if abs(ours - theirs) > most
    ]
    moved = int(np.abs(np.subtract(numbers["confusion"], card["confusion"])).sum()) // 2
    if moved > tolerance * card["test_images"]:
        found.append(f"confusion: {moved} answers of {card['test_images']} are others")
    return found
