"""Numbers on command lines: what is out of range is an error at once, not nonsense later."""

import argparse
import math


def number(kind: type, least: float = 0, most: float = math.inf):
    """A type for argparse: an int or a float (kind) from least to most, both included."""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:  # nor is nan
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name the type
    return parse
