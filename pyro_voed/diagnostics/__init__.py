"""Whether a posterior can be trusted: checks that need no look inside the method that made it."""

from pyro_voed.diagnostics.agreement import AgreementResult, C2STResult, agreement, c2st

__all__ = ["AgreementResult", "C2STResult", "agreement", "c2st"]
