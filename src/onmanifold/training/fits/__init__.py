"""How manifolds are learned: for each, which losses its players take in turn."""

# Imported for their registrations too.
from onmanifold.training.fits.base import ClosedForm, Fit, FitStep
from onmanifold.training.fits.cvae import CVAEFit
from onmanifold.training.fits.glow import GlowFit
from onmanifold.training.fits.ppca import PPCAFit
from onmanifold.training.fits.sngan import SNGANFit
from onmanifold.training.fits.stylegan import StyleGANFit
from onmanifold.training.fits.vae_gan import VAEGANFit

__all__ = [
    "CVAEFit",
    "ClosedForm",
    "Fit",
    "FitStep",
    "GlowFit",
    "PPCAFit",
    "SNGANFit",
    "StyleGANFit",
    "VAEGANFit",
]
