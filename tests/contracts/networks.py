"""Small convolutional networks of every kind of coupling, written here from their papers; random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def block(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """conv, batch norm, ReLU"""
    return nn.Sequential(conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class VGG(nn.Module):
    """Simonyan and Zisserman 2014: flattened into the classifier, so each channel owns four of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 8, bias=True), nn.ReLU(inplace=True), conv(8, 8, bias=True), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(8, 12, bias=True), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(12, 16, bias=True), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


class Basic(nn.Module):
    """He et al. 2016; `option` "A" (every second pixel, zero channels), "B" (a 1x1 projection)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, option: str = "B"):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.more = outputs - inputs
        self.option = option if stride > 1 or inputs != outputs else ""
        if self.option == "B":
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.option == "A":
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        elif self.option == "B":
            x = self.shortcut(x)
        out += x
        return F.relu(out)


class Bottleneck(nn.Module):
    """He et al. 2016, with `groups` that of ResNeXt (Xie et al. 2017)."""

    def __init__(self, inputs: int, outputs: int, middle: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            block(inputs, middle, 1), block(middle, middle, 3, stride, groups), conv(middle, outputs, 1)
        )
        self.bn = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.body(x)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, blocks: Callable[[], list[nn.Module]], first: int, last: int):
        super().__init__()
        self.conv1, self.bn1 = conv(3, first), nn.BatchNorm2d(first)
        self.layers = nn.Sequential(*blocks())
        self.linear = nn.Linear(last, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        answer: Tensor = self.linear(out)
        return answer


def resnet18() -> nn.Module:
    widths = (8, 8, 12, 12, 16, 16)
    pairs = list(zip((8, *widths), widths, strict=False))
    return ResNet(lambda: [Basic(a, b, 1 if a == b else 2) for a, b in pairs], 8, 16)


def resnet50() -> nn.Module:
    return ResNet(lambda: [Bottleneck(8, 24, 6), Bottleneck(24, 24, 6), Bottleneck(24, 32, 8, 2)], 8, 32)


def resnext() -> nn.Module:
    return ResNet(lambda: [Bottleneck(8, 24, 12, 1, 3), Bottleneck(24, 24, 12, 2, 4)], 8, 24)


def cifar_resnet(depth: int) -> nn.Module:
    """He et al. 2016, section 4.2; narrow."""
    n = (depth - 2) // 6
    widths = [4] * n + [8] * n + [16] * n
    pairs = list(zip([4, *widths], widths, strict=False))
    return ResNet(lambda: [Basic(a, b, 1 if a == b else 2, "A") for a, b in pairs], 4, 16)


class Inverted(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        wide = 3 * inputs
        self.body = nn.Sequential(
            *(conv(inputs, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(conv(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(conv(wide, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = ((6, 6, 1), (6, 8, 2), (8, 8, 1), (8, 10, 2))
        self.features = nn.Sequential(block(3, 6), *(Inverted(*pair) for pair in pairs), block(10, 16, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).mean([2, 3]))
        return out


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 3 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(3 * growth), conv(3 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, out], 1)


class DenseNet(nn.Module):
    """Huang et al. 2017."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 6), DenseLayer(6, 4), DenseLayer(10, 4)),
            *(nn.BatchNorm2d(14), nn.ReLU(), conv(14, 8, 1), nn.AvgPool2d(2)),
            *(DenseLayer(8, 4), nn.BatchNorm2d(12), nn.ReLU()),
        )
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).flatten(1))
        return out


class SE(nn.Module):
    """Hu et al. 2018."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        weight = F.adaptive_avg_pool2d(x, 1).view(b, c)
        out: Tensor = x * self.fc(weight).view(b, c, 1, 1).expand_as(x)
        return out


class SEBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body, self.bn = nn.Sequential(block(width, width), conv(width, width)), nn.BatchNorm2d(width)
        self.se = SE(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.se(self.bn(self.body(x))))


def se_resnet() -> nn.Module:
    return ResNet(lambda: [SEBlock(8), SEBlock(8)], 8, 8)


class UNet(nn.Module):
    """Ronneberger et al. 2015: its answer is a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 6), block(6, 8), block(8, 12)
        self.up2, self.up1 = nn.ConvTranspose2d(12, 8, 2, 2), nn.ConvTranspose2d(8, 6, 2, 2)
        self.right2, self.right1 = block(16, 8), block(12, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        two = self.right2(torch.cat([two, self.up2(three)], dim=1))
        one = self.right1(torch.cat((F.interpolate(self.up1(two), size=one.shape[2:], mode="nearest"), one), dim=1))
        out: Tensor = self.last(one)
        return out


class ChannelNorm(nn.Module):
    """Layer norm over the channels of [B, C, H, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + (self.gamma * out).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 2, 2), ChannelNorm(6))
        self.stages = nn.Sequential(ConvNeXtBlock(6), ChannelNorm(6), nn.Conv2d(6, 8, 2, 2), ConvNeXtBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.stages(self.stem(x)).mean([-2, -1])))
        return out


class Branches(nn.Module):
    """Szegedy et al. 2015: branches of several sizes, side by side."""

    def __init__(self, inputs: int):
        super().__init__()
        self.one, self.three = block(inputs, 5, 1), nn.Sequential(block(inputs, 4, 1), block(4, 6, 3))
        self.five = nn.Sequential(block(inputs, 3, 1), block(3, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), block(inputs, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8), Branches(8), nn.MaxPool2d(2), Branches(18))
        self.fc = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).mean(dim=(2, 3)))
        return out


class ShuffleBlock(nn.Module):
    """Ma et al. 2018: half of the channels go through, then halves are shuffled."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            block(half, half, 1), conv(half, half, 3, groups=half), nn.BatchNorm2d(half), block(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.body(right)), 1)
        b, c, h, w = out.shape
        return out.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8), ShuffleBlock(8), ShuffleBlock(8), block(8, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).mean([2, 3]))
        return out


class Twice(nn.Module):
    """One module used twice, and split halves that gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.gate = block(3, 8), conv(8, 8), conv(8, 12)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.norm(self.shared(x)))
        x = F.relu(self.norm(self.shared(x)))
        a, b = torch.split(self.gate(x), 6, dim=1)
        out: Tensor = self.fc((a * torch.sigmoid(b)).amax((2, 3)))
        return out


class Norms(nn.Module):
    """Group norm in two ways, instance norm, PReLU, a transposed depthwise layer, a skipped slice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.group = conv(3, 12), nn.GroupNorm(4, 12)
        self.two, self.instance = conv(12, 8), nn.InstanceNorm2d(8, affine=True)
        self.act = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=8)
        self.three = conv(5, 6)
        self.single = nn.GroupNorm(6, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.group(self.one(x)))
        x = self.up(self.act(self.instance(self.two(x))))
        x = self.single(self.three(x[:, 2:7]))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Corners(nn.Module):
    """What few networks have: a filter that is not learnt, work in place on a shortcut, a slice counted from the end,
    attention by one channel, places of maxima, pictures and channels put together, a group that only a transposed
    convolution reads, an assignment.
    """

    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = block(3, 8), conv(8, 6), conv(6, 8)
        self.register_buffer("blur", torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])).tile(8, 1, 1, 1) / 16)
        self.beside, self.last_six = conv(8, 10), conv(6, 8)
        self.attention, self.low, self.up = conv(8, 1, 1), conv(8, 6), nn.ConvTranspose2d(6, 8, 2, 2)
        self.kept, self.spread, self.part = conv(8, 4), conv(4, 8), conv(8, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.conv2d(self.stem(pictures), self.blur, padding=1, groups=8)
        x = x + self.two(self.one(F.relu_(x)))
        x = self.last_six(torch.cat([pictures, self.beside(x)], 1)[:, -6:])
        x = x * torch.sigmoid(self.attention(x))
        x = F.relu(self.up(F.max_pool2d(self.low(x), 2)))
        places = F.max_pool2d(self.kept(x), 2, return_indices=True)
        x = self.spread(F.max_unpool2d(*places, 2))
        x = x.reshape(x.shape[0] * 8, -1).softmax(1).reshape(-1, 8, *x.shape[2:]) + x
        y = torch.zeros_like(x)
        y[:, 2:6] = self.part(x) + x[:, :4]
        out: Tensor = self.fc(y.amax((2, 3)))
        return out


@dataclass(frozen=True)
class Case:
    """How to make a network, the size of its pictures, the weights whose channels can go, and those that cannot."""

    make: Callable[[], nn.Module]
    size: int
    cut: tuple[str, ...]
    whole: tuple[str, ...] = ()


NETWORKS = {
    "vgg": Case(VGG, 16, ("features.0", "features.5", "features.9", "classifier.0"), ("classifier.3",)),
    "resnet18": Case(resnet18, 16, ("conv1", "layers.0.conv1", "layers.2.conv2"), ("linear",)),
    "resnet50": Case(resnet50, 16, ("conv1", "layers.1.body.0.0", "layers.2.body.2"), ("linear",)),
    "cifar-resnet20": Case(lambda: cifar_resnet(20), 16, ("conv1", "layers.3.conv2", "layers.8.conv1"), ("linear",)),
    "cifar-resnet56": Case(lambda: cifar_resnet(56), 16, ("conv1", "layers.9.conv2", "layers.26.conv1"), ("linear",)),
    "mobilenetv2": Case(MobileNetV2, 16, ("features.0.0", "features.1.body.0", "features.5.0"), ("classifier.1",)),
    "densenet": Case(DenseNet, 8, ("features.0", "features.1.conv1", "features.2.conv2"), ("classifier",)),
    "se-resnet": Case(se_resnet, 8, ("conv1", "layers.0.se.fc.0", "layers.1.body.0.0"), ("linear",)),
    "unet": Case(UNet, 16, ("one.0", "three.0", "up2", "up1", "right1.0"), ("last",)),
    "convnext": Case(ConvNeXt, 8, ("stages.0.up", "stages.3.up"), ("head",)),
    "inception": Case(Inception, 8, ("body.0.0", "body.1.three.0.0", "body.3.pool.1.0"), ("fc",)),
    "shufflenet": Case(ShuffleNet, 8, ("body.1.body.0.0", "body.3.0"), ("fc",)),
    "resnext": Case(resnext, 8, ("conv1", "layers.0.body.0.0", "layers.1.body.1.0"), ("linear",)),
    "twice": Case(Twice, 8, ("first.0", "gate"), ("fc",)),
    "corners": Case(Corners, 8, ("stem.0", "beside", "last_six", "low", "up"), ("kept", "spread", "fc")),
    "norms": Case(Norms, 8, ("one", "two", "three"), ("fc",)),
}


def example(case: Case, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))


def network(case: Case) -> nn.Module:
    """In eval mode, with statistics and weights of no special values."""
    torch.manual_seed(0)
    model = case.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                torch.randn_like(module.running_mean),
                torch.rand_like(module.running_var) + 0.5,
            )  # type: ignore[arg-type]
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            module.weight.data, module.bias.data = torch.randn_like(module.weight), torch.randn_like(module.bias)
    return model.eval()
