"""The card as a page for a person."""

_PAGE = """\
# fashion_cnn, trained on Fashion-MNIST

A convolutional network of {parameters:,} weights that says which of ten kinds of clothing a picture of 28x28 grey
pixels shows. **{accuracy:.2%}** of the {test_images:,} test images are answered rightly.

This page is written by the command that makes the files. `python -m models.pretrained evaluate` computes the numbers
anew from `fashion_cnn.keras`, and a test compares them with `card.json`.

## How it was made

```
{command}
python -m models.pretrained make runs/pretrained
```

| | |
|---|---|
| data | Fashion-MNIST (Xiao et al. 2017, MIT licence): {training_images:,} training images, none of the test images |
| seed | {seed} |
| epochs | {epochs} (`log.csv`, `settings.json`) |
| cost | {minutes:.0f} minutes, on {machine} |
| made with | keras_bn {versions[keras_bn]}, Keras {versions[keras]}, TensorFlow {versions[tensorflow]} |
| accuracy with the moving statistics of the training | {accuracy_before_recalibration:.4f} |
| after `keras_bn.recalibrate` on the {population} | {accuracy:.4f} |

![Loss and accuracy by epoch](curve.png)

The training's own accuracy is that on augmented images, which are harder than the test images.

## Accuracy of each class

| class | accuracy |
|---|---|
{classes}

![Labels by answers](confusion.png)

## What it is for

An example that is small enough to ship and good enough to be worth serving: for trying a server, measuring one, and
seeing how a normalization is recalibrated, folded and exported. It takes pictures as the data set has them: one piece
of clothing, upright, filling the picture, light on black.

## What it is not for

- Photographs: another background, a person who wears the thing, several things, colour. It answers one of its ten
  classes whatever it is shown; a probability says how alike training images are, not how sure to be of a photograph.
- Decisions about people. The images are from one shop's catalogue and stand for nobody's clothing in general.
- Telling tops apart: {worst} is its weakest class ({worst_accuracy:.1%}).

`examples/` holds the first test image of each class, whatever the network makes of it.
"""


def card_text(card: dict) -> str:
    """Write the page.

    Args:
        card: What `card.json` holds.

    Returns:
        Markdown.
    """
    per_class = card["accuracy_per_class"]
    worst = min(per_class, key=per_class.get)
    classes = "\n".join(f"| {name} | {accuracy:.3f} |" for name, accuracy in per_class.items())
    return _PAGE.format(**card, classes=classes, worst=worst, worst_accuracy=per_class[worst])
