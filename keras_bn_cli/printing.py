"""What the commands print on stdout: reports, and the card of a version."""

import json
from pathlib import Path
from typing import Any

import click

from keras_bn_cli.files import card_of


def print_report(report: Any, as_json: bool) -> None:
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}")


def print_card(version: Path, as_json: bool) -> None:
    card = card_of(version)
    if as_json:
        click.echo(json.dumps(card, indent=2))
        return
    click.echo(f"{version}: model {card['model']}, {card['parameters']:,} parameters, {card['created']}")
    click.echo(", ".join(f"{name} {number}" for name, number in card["versions"].items()))
    for name, signature in card["signatures"].items():
        click.echo(f"{name}:")
        for direction in ("inputs", "outputs"):
            for tensor, spec in signature[direction].items():
                shape = ", ".join("any" if size is None else str(size) for size in spec["shape"])
                click.echo(f"  {direction[:-1]:<6}  {tensor}: {spec['dtype']} ({shape})")
    if card["accuracy"] is not None:
        click.echo(f"accuracy: {card['accuracy']:.4f}")
    if card["folding"] is not None:
        folding = card["folding"]
        click.echo(
            f"folding: {folding['absorbed']} of {len(folding['normalizations'])} normalizations absorbed, "
            f"relative error {folding['relative_error']:.3g}"
        )
