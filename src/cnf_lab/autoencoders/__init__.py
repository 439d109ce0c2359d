"""Variational autoencoders with flows in their posteriors."""

from cnf_lab.autoencoders.autoencoder import ElboTerms as ElboTerms
from cnf_lab.autoencoders.autoencoder import VariationalAutoencoder as VariationalAutoencoder
from cnf_lab.autoencoders.autoencoder import variational_autoencoder as variational_autoencoder
from cnf_lab.autoencoders.likelihoods import Bernoulli as Bernoulli
from cnf_lab.autoencoders.likelihoods import Categorical as Categorical
from cnf_lab.autoencoders.likelihoods import PixelLikelihood as PixelLikelihood
from cnf_lab.autoencoders.likelihoods import pixel_likelihood as pixel_likelihood
from cnf_lab.autoencoders.networks import ConvDecoder as ConvDecoder
from cnf_lab.autoencoders.networks import ConvEncoder as ConvEncoder
from cnf_lab.autoencoders.posteriors import Posterior as Posterior
from cnf_lab.autoencoders.posteriors import autoregressive_flow as autoregressive_flow
from cnf_lab.autoencoders.posteriors import continuous_flow as continuous_flow
from cnf_lab.autoencoders.posteriors import no_flow as no_flow
from cnf_lab.autoencoders.posteriors import planar_flow as planar_flow
from cnf_lab.autoencoders.posteriors import sylvester_flow as sylvester_flow
