"""Exact values of choices and judgements: all outcomes summed, latents on a grid."""

from tests.suite.exact.glm import product
from tests.suite.quadrature import summed
from tests.suite.twins.choices import TWINS


def softmax_choice():
    return summed(TWINS["softmax_choice"], ("taste",), product(*[range(3)] * 6), {"taste": 41}, reach=5.5)


def ordinal():
    return summed(TWINS["ordinal"], ("ability",), product(*[range(4)] * 5), {"ability": 81})


def psychometric():
    sizes = {"threshold": 49, "slope": 41, "lapse": 13}
    return summed(TWINS["psychometric"], ("threshold", "slope"), product(*[range(11)] * 3), sizes, reach=4.5)


def delay_discounting():
    return summed(TWINS["delay_discounting"], ("rate",), product(*[range(2)] * 8), {"rate": 151, "temperature": 31})


EXACT = {function.__name__: function for function in (softmax_choice, ordinal, psychometric, delay_discounting)}
