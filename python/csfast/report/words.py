"""Plain words for the short names that results use: methods, codes, thresholds, cases.

Names are those of `csfast ablate --methods`; one that is not known here is shown as it is.
"""

from __future__ import annotations

import re

# Name, in as few letters as fit beside a mark, and so that it can stand in a sentence.
_METHODS = (
    (r"planes-b(\d+)", "{} bits", "csfast with {} bits"),
    (
        r"planes-b(\d+)-plain",
        "{} bits, plain",
        "csfast with {} bits, every weight coded by itself",
    ),
    (
        r"planes-b(\d+)-block-(\d+)",
        "{} bits, blocks of {}",
        "csfast with {} bits, neurons kept in blocks of {}",
    ),
    (
        r"planes-b(\d+)-joint-(\d+)",
        "{} bits, {} requests",
        "csfast with {} bits, {} requests that share their neurons",
    ),
    (r"ternary", "1.6 bits", "csfast with 1.6 bits (weights coded as -1, 0 or 1)"),
    (
        r"ternary-plain",
        "1.6 bits, plain",
        "csfast with 1.6 bits, every weight coded by itself",
    ),
    (r"teal", "TEAL", "TEAL (leaves out small inputs)"),
    (r"teal-greedy", "TEAL, greedy", "TEAL (leaves out small inputs, shares searched for)"),
    (r"wina", "WINA", "WINA (leaves out small inputs, by the norms of their weights)"),
    (r"rsparse-(\d+)", "R-Sparse {}", "R-Sparse (small inputs by a product of rank {})"),
    (r"cats", "CATS", "CATS (computes all gates, keeps the largest)"),
    (r"lowrank-(\d+)", "rank {}", "an estimate of rank {} of what each neuron adds"),
    (r"dejavu-(\d+)", "Deja Vu {}", "Deja Vu (a trained predictor of {} hidden units)"),
    (r"linear", "linear map", "a linear map from the input to what each neuron adds"),
    (r"griffin", "GRIFFIN", "GRIFFIN (the neurons that the prompt used)"),
    (r"static", "static", "the neurons that the calibration used most"),
    (r"static-task", "static, by task", "the neurons that the task used most"),
    (r"previous", "last token's", "the neurons that the token before used most"),
    (r"random", "random", "random neurons"),
    (r"random-(\d+)", "pursuit {}", "matching pursuit on {} measurements"),
    (
        r"innovation-(\d+)",
        "innovation {}",
        "matching pursuit on {} measurements of what differs from the task's mean",
    ),
    (r"mmse-(\d+)", "linear {}", "a linear estimate from {} measurements"),
    (r"probe-(\d+)", "probes {}", "{} neurons computed exactly, the others guessed from them"),
    (
        r"mixed-(\d+)\+(\d+)",
        "{}+{} bits",
        "{}-bit weights, {} bits more for neurons that matter",
    ),
    (
        r"mixed-(\d+)/(\d+)",
        "{} or {} bits",
        "{}-bit weights, {}-bit ones for neurons that matter",
    ),
    (r"rtn-int(\d+)", "int{}", "int{} weights, rounded"),
    (r"gptq-int(\d+)", "int{}, calibrated", "int{} weights, calibrated"),
    (r"oracle-neuron", "neurons", "a perfect choice of neurons"),
    (r"oracle-block-(\d+)", "blocks of {}", "a perfect choice of blocks of {} neurons"),
    (
        r"oracle-block-(\d+)-original",
        "blocks of {}, model's order",
        "a perfect choice of blocks of {} neurons in the model's order",
    ),
    (r"oracle-channel", "inputs", "a perfect choice of input channels"),
    (r"oracle-head", "heads", "a perfect choice of attention heads"),
    (r"oracle-layer", "layers", "a perfect choice of whole layers"),
)
_PATTERNS = tuple((re.compile(pattern), (name, said)) for pattern, name, said in _METHODS)
_CASE = re.compile(r"ffn d=(\d+) F=(\d+) density=(0?\.\d+|1\.00)(.*)")


def short(method: str) -> str:
    """Give a method in few letters, without its family."""
    return _worded(method, 0)


def plain(method: str) -> str:
    """Give a method in words that can stand in a sentence."""
    return _worded(method, 1)


def _worded(method: str, which: int) -> str:
    for pattern, words in _PATTERNS:
        match = pattern.fullmatch(method)
        if match is not None:
            return words[which].format(*match.groups())
    return method


def code(bits: int | str) -> str:
    """Give the code of a sensor: how many bits of a weight decide which neurons matter."""
    if bits == "ternary":
        return "1.6 bits of every weight (-1, 0 or 1)"
    return f"{bits} bit{'' if bits == 1 else 's'} of every weight"


def thresholds(task: str) -> str:
    """Give whose thresholds decided."""
    whose = "all tasks together" if task == "pooled" else task
    return f"thresholds for {whose}"


def case(name: str) -> str:
    """Give the sizes that the name of a benchmark's case spells."""
    match = _CASE.fullmatch(name)
    if match is None:
        return name
    channels, neurons, density, rest = match.groups()
    more = rest.replace(" bits=", ", bits: ").replace(" blocks=", ", blocks of ")
    more = more.replace(" batch=", ", requests that share their neurons: ").removesuffix(" joint")
    return f"{channels} channels, {neurons} neurons, {float(density):.0%} executed{more}"


def ratio(value: float) -> str:
    """Say how csfast compares; `value` is the dense time over ours."""
    return f"{value:.2f} times faster" if value >= 1 else f"{1 / value:.2f} times slower"
