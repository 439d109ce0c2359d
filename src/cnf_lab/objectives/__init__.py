"""Training objectives and penalties."""

from cnf_lab.objectives.base import LossTerms as LossTerms
from cnf_lab.objectives.base import Objective as Objective
from cnf_lab.objectives.likelihood import Likelihood as Likelihood
from cnf_lab.objectives.regularisers import JacobianNorm as JacobianNorm
from cnf_lab.objectives.regularisers import KineticEnergy as KineticEnergy
from cnf_lab.objectives.regularisers import Regulariser as Regulariser
