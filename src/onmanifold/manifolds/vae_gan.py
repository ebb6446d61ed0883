"""VAE-GANs, one per class or one for all: the learned manifolds of Disentangling (B.2)."""

from __future__ import annotations

from torch import Tensor, nn

from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds.coding import (
    Encoder,
    Network,
    RoutedChart,
    Routing,
    check_batch,
    classes_of,
    convolutions,
    frozen_copy,
    transposed_convolutions,
)
from onmanifold.manifolds.learned import ImageShape, LearnedManifold

# Of the discriminator's hidden layer: as many as the released code has.
_HIDDEN = 10
# Initial deviation of the weights of convolutions, the released code's; batch norm makes up for the scale.
_DEVIATION = 0.001


@MANIFOLDS.register("vae_gan")
class VAEGAN(LearnedManifold):
    """Encoder and decoder of a VAE-GAN; the code of an image is the mean of its posterior, cut to the box.

    Class-specific: one encoder and one decoder per class, to which images go by their label and codes by their
    last column. So an image on the manifold belongs to a class by construction, as far as the decoder is right.
    Gradients of `decode` reach the codes and not the weights. Source: Disentangling 3.1 and B.2.

    Args:
        image_shape: (C, H, W); any sides that the layers leave a pixel of.
        num_classes: K.
        latent_size: Columns that may move; the released code has 25 for CelebA.
        class_specific: Whether each class has networks of its own; else all share one pair, which knows no class.
        channels: Of the three convolutions of the encoder; the paper has four for CelebA. The decoder
            has them backwards.
        decoder_kernel: Size of the decoder's kernels: the paper's 4, or 6 as in the released code.

    Attributes:
        encoders: K, or one: images to a `Posterior`.
        decoders: As many: latents to the logits of pixels.
    """

    name = "vae_gan"
    box = 2.0

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        latent_size: int = 10,
        class_specific: bool = True,
        channels: tuple[int, ...] = (64, 128, 256),
        decoder_kernel: int = 4,
    ) -> None:
        super().__init__(image_shape, num_classes, latent_size, conditional=class_specific)
        self.channels = tuple(channels)
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_classes if class_specific else 1):
            trunk, features = convolutions(self.image_shape, channels)
            self.encoders.append(Encoder(trunk, features, latent_size))
            self.decoders.append(
                transposed_convolutions(self.image_shape, channels, latent_size, decoder_kernel)
            )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, 0, _DEVIATION)

    def discriminators(self) -> nn.ModuleList:
        """Fresh discriminators, one for each decoder: images (B, C, H, W) to logits (B, 1), real above 0."""
        made = nn.ModuleList()
        for _ in self.decoders:
            trunk, features = convolutions(self.image_shape, self.channels)
            head = (nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
            made.append(nn.Sequential(*trunk, *head))
        return made

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        check_batch(self, images, labels)
        routing = Routing(labels if self.conditional else labels.new_zeros(len(images)))

        def make(number: int) -> Network:
            encoder = self.encoders[number]
            return lambda part: encoder(part.to(encoder.mean.weight.dtype)).mean  # type: ignore

        networks = {number: make(number) for number in routing.present or [0]}
        latents = routing(networks, images).to(images.dtype)
        return self.codes_of(latents.clamp(-self.box, self.box), labels)

    def decode(self, codes: Tensor) -> Tensor:
        chart = self.chart(codes)
        return chart.decode(chart.latents)

    def chart(self, codes: Tensor) -> RoutedChart:
        self.check_codes(codes, len(codes))

        def make(number: int) -> Network:
            decoder = self.decoders[number]
            assert isinstance(decoder, nn.Sequential)
            return nn.Sequential(*frozen_copy(decoder, codes.dtype), nn.Sigmoid())

        return RoutedChart(self, codes, classes_of(self, codes), make)
