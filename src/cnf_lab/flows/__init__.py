"""Invertible transforms, and the densities that they make."""

from cnf_lab.flows.base import Chain as Chain
from cnf_lab.flows.base import Flow as Flow
from cnf_lab.flows.base import Integrand as Integrand
from cnf_lab.flows.base import Mapped as Mapped
from cnf_lab.flows.base import Transform as Transform
from cnf_lab.flows.base import UnconditionalTransform as UnconditionalTransform
from cnf_lab.flows.base_distribution import StandardNormal as StandardNormal
from cnf_lab.flows.continuous import ContinuousFlow as ContinuousFlow
from cnf_lab.flows.continuous import continuous_blocks as continuous_blocks
from cnf_lab.flows.density import density_flow as density_flow
from cnf_lab.flows.finite import FiniteTransform as FiniteTransform
from cnf_lab.flows.finite import maf_flow as maf_flow
from cnf_lab.flows.finite import nsf_flow as nsf_flow
from cnf_lab.flows.finite import realnvp_flow as realnvp_flow
from cnf_lab.flows.gaussianise import Gaussianise as Gaussianise
from cnf_lab.flows.gaussianise import RadialGaussianise as RadialGaussianise
from cnf_lab.flows.normalisation import ActNorm as ActNorm
from cnf_lab.flows.normalisation import MovingBatchNorm as MovingBatchNorm
from cnf_lab.flows.preprocess import ContextScaler as ContextScaler
from cnf_lab.flows.preprocess import NoPreprocess as NoPreprocess
from cnf_lab.flows.preprocess import Preprocess as Preprocess
from cnf_lab.flows.preprocess import Standardise as Standardise
from cnf_lab.flows.preprocess import Whiten as Whiten
from cnf_lab.flows.sequence import BlockSequence as BlockSequence
