"""Digits of a double as Grisu2 finds them: they give the number back, and in 999 of 1000 cases none fewer would.

RapidJSON writes doubles with it, so a message that quotes a number holds these digits and not always the fewest.

Reference:
    Loitsch, "Printing Floating-Point Numbers Quickly and Accurately with Integers", 2010, section 5.
"""

import functools
import math

_BITS = 64
_LOG10_OF_2 = 0.30102999566398114
# Powers of ten stand eight apart, from this one on.
_LEAST_POWER = -348
# Further down the last digit stays as it is.
_MOST_ROUNDED_DIGITS = 9


def digits(number: float) -> tuple[str, int]:
    """Returns digits and exponent of a positive, normal double: `number` is about `int(digits) * 10**exponent`."""
    mantissa, exponent = math.frexp(number)
    fraction = int(mantissa * 2**53)
    exponent -= 53
    # The numbers half way to the next double up and down, and the double, as integers of 64 bits and one exponent.
    above, below = 2 * fraction + 1, 2 * fraction - 1
    shift = _BITS - above.bit_length()
    above <<= shift
    below = below << shift if fraction != 2**52 else (4 * fraction - 1) << (shift - 1)
    here = fraction << (_BITS - fraction.bit_length())
    power = _power_for(exponent - 1 - shift)
    factor, factor_exponent = _power_of_ten(power)
    scaled_exponent = exponent - 1 - shift + factor_exponent + _BITS
    high = _product(above, factor) - 1
    low = _product(below, factor) + 1
    middle = _product(here, factor)
    text, more = _generate(high, high - middle, high - low, -scaled_exponent)
    return text, more - power


def _generate(high: int, distance: int, delta: int, bits: int) -> tuple[str, int]:
    """Writes digits of `high / 2**bits` until what is left is within `delta`."""
    whole, rest = high >> bits, high & ((1 << bits) - 1)
    text = str(whole)
    for length in range(1, len(text) + 1):
        kappa = len(text) - length
        left = ((whole % 10**kappa) << bits) + rest
        if left <= delta:
            return _rounded(text[:length], delta, left, 10**kappa << bits, distance), kappa
    text = text.lstrip("0")
    for kappa in range(1, _BITS):
        rest, delta = rest * 10, delta * 10
        text += str(rest >> bits) if text or rest >> bits else ""
        rest &= (1 << bits) - 1
        if rest < delta:
            scale = 10**kappa if kappa < _MOST_ROUNDED_DIGITS else 0
            return _rounded(text, delta, rest, 1 << bits, distance * scale % 2**_BITS), -kappa
    raise ArithmeticError("the digits of a double do not end")


def _rounded(text: str, delta: int, rest: int, step: int, distance: int) -> str:
    """Takes from the last digit while that brings the number nearer."""
    last = int(text[-1])
    while (
        rest < distance
        and delta - rest >= step
        and (rest + step < distance or distance - rest > rest + step - distance)
    ):
        last -= 1
        rest += step
    return text[:-1] + str(last)


def _product(left: int, right: int) -> int:
    return (left * right + (1 << (_BITS - 1))) >> _BITS


def _power_for(exponent: int) -> int:
    steps = math.ceil((-61 - exponent) * _LOG10_OF_2 + 347)
    return _LEAST_POWER + 8 * ((steps >> 3) + 1)


@functools.cache
def _power_of_ten(power: int) -> tuple[int, int]:
    """Returns 10**power as an integer of 64 bits and an exponent of two."""
    numerator, denominator = (10**power, 1) if power >= 0 else (1, 10**-power)
    exponent = numerator.bit_length() - denominator.bit_length() - _BITS
    fraction = _divided(numerator, denominator, exponent)
    if fraction.bit_length() != _BITS:
        exponent += fraction.bit_length() - _BITS
        fraction = _divided(numerator, denominator, exponent)
    return fraction, exponent


def _divided(numerator: int, denominator: int, exponent: int) -> int:
    numerator, denominator = numerator << max(0, -exponent), denominator << max(0, exponent)
    return (2 * numerator + denominator) // (2 * denominator)
