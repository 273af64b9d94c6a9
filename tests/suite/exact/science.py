"""Exact values of nonlinear models, the divergence of the posterior by quadrature and averaged."""

from tests.suite.quadrature import averaged
from tests.suite.twins.science import TWINS


def pharmacokinetics():
    sizes = {"clearance": 91, "volume": 61}
    return averaged(TWINS["pharmacokinetics"], ("clearance", "volume"), sizes, log2_draws=10, reach=4.8)


def dose_response():
    return averaged(TWINS["dose_response"], ("log_half",), {"log_half": 121}, log2_draws=12)


def calorimetry():
    sizes = {"affinity": 81, "heat": 121}
    return averaged(TWINS["calorimetry"], ("affinity", "heat"), sizes, log2_draws=9, reach=4.8)


def bearings():
    return averaged(TWINS["bearings"], ("position",), {"position": 71}, log2_draws=11, reach=4.8)


EXACT = {function.__name__: function for function in (pharmacokinetics, dose_response, calorimetry, bearings)}
