"""Whether a posterior can be trusted: checks that need no look inside the method that made it.

* over simulated experiments (`simulate_posteriors`): `sbc`, `expected_coverage`, `tarp`, `recovery`,
  `negative_log_posterior`;
* at one outcome: `posterior_predictive_check`, `misspecification`, `local_c2st`;
* between two sets of draws: `agreement`, `c2st`, `mmd`, `sliced_wasserstein`, `empirical_kl`;
* of what was learned: `collapse_check`; and `pyro_voed.certificates.bound_gap`.
"""

from pyro_voed.diagnostics.agreement import AgreementResult, C2STResult, agreement, c2st
from pyro_voed.diagnostics.calibration import SBCResult, sbc
from pyro_voed.diagnostics.collapse import collapse_check
from pyro_voed.diagnostics.coverage import CoverageResult, expected_coverage
from pyro_voed.diagnostics.distances import DistanceResult, empirical_kl, mmd, sliced_wasserstein
from pyro_voed.diagnostics.local_c2st import LocalC2STResult, local_c2st
from pyro_voed.diagnostics.misspecification import MisspecificationResult, misspecification
from pyro_voed.diagnostics.predictive import PredictiveCheckResult, posterior_predictive_check
from pyro_voed.diagnostics.recovery import RecoveryResult, recovery
from pyro_voed.diagnostics.scores import NegativeLogPosteriorResult, negative_log_posterior
from pyro_voed.diagnostics.simulated import SimulatedPosteriors, simulate_posteriors
from pyro_voed.diagnostics.tarp import TARPResult, tarp

__all__ = [
    "AgreementResult",
    "C2STResult",
    "CoverageResult",
    "DistanceResult",
    "LocalC2STResult",
    "MisspecificationResult",
    "NegativeLogPosteriorResult",
    "PredictiveCheckResult",
    "RecoveryResult",
    "SBCResult",
    "SimulatedPosteriors",
    "TARPResult",
    "agreement",
    "c2st",
    "collapse_check",
    "empirical_kl",
    "expected_coverage",
    "local_c2st",
    "misspecification",
    "mmd",
    "negative_log_posterior",
    "posterior_predictive_check",
    "recovery",
    "sbc",
    "simulate_posteriors",
    "sliced_wasserstein",
    "tarp",
]
