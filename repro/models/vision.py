"""A small convolutional network: few parameters and much computation, as GoogLeNet has in Wang et al. 2017."""

import torch
from torch import Tensor, nn

from repro.errors import ReproError


class SmallCNN(nn.Module):
    """`forward(images (B, 1, H, W)) -> logits (B, classes)`; height and width at least 3, 32 meant.

    61,130 parameters with ten classes, and 4.8 million multiply-adds for an image of 32 x 32 pixels: 79 a parameter. As in
    GoogLeNet the first convolution is strided and the mean of each last feature map stands in for large linear layers. No
    batch normalisation and no dropout: the loss of a minibatch is the mean of the losses of its slices, so that training on
    several ranks can equal that of one process. He initialisation from torch's generator.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        if classes < 1:
            raise ReproError(f"classes is {classes}: the network needs at least one")
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of the images whose largest logit is their label's; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in pairs)
    model.train(training)
    return right / len(labels)
