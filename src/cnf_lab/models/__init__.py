"""The LightningModules of the model families."""

from cnf_lab.models.base import FlowModule as FlowModule
from cnf_lab.models.density import DensityModule as DensityModule
from cnf_lab.models.image import ImageModule as ImageModule
from cnf_lab.models.likelihood import LikelihoodModule as LikelihoodModule
from cnf_lab.models.vae import VaeModule as VaeModule
