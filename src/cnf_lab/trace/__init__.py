"""Divergence estimators; the configuration group keeps the user's word, ``trace``."""

from cnf_lab.trace.auto import Auto as Auto
from cnf_lab.trace.base import DivergenceEstimator as DivergenceEstimator
from cnf_lab.trace.base import Linearised as Linearised
from cnf_lab.trace.base import Needs as Needs
from cnf_lab.trace.base import Probe as Probe
from cnf_lab.trace.derivatives import extended as extended
from cnf_lab.trace.exact import Exact as Exact
from cnf_lab.trace.hutchinson import Bottleneck as Bottleneck
from cnf_lab.trace.hutchinson import Gaussian as Gaussian
from cnf_lab.trace.hutchinson import Hutchinson as Hutchinson
from cnf_lab.trace.hutchinson import HutchPlusPlus as HutchPlusPlus
from cnf_lab.trace.hutchinson import Rademacher as Rademacher
