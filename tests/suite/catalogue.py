"""All models of the suite by name, and their twins."""

from tests.suite import counts, glm, regression, tails
from tests.suite.twins import counts as counts_twins
from tests.suite.twins import glm as glm_twins
from tests.suite.twins import regression as regression_twins
from tests.suite.twins import tails as tails_twins

FAMILIES = (regression, glm, tails, counts)
MODELS = {entry.name: entry for family in FAMILIES for entry in family.MODELS}
TWINS = {
    name: twin
    for family in (regression_twins, glm_twins, tails_twins, counts_twins)
    for name, twin in family.TWINS.items()
}
