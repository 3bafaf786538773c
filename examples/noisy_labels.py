"""Noisy labels: 40 % of the training labels of scikit-learn's digits are wrong.

    python examples/noisy_labels.py

One small network, trained under cross entropy and under the bounded rooted loss, scored on clean
test labels. Cross entropy learns the wrong labels by heart; the bounded loss gives a sample near
weight 0 where the network is sure of another class.
"""

from __future__ import annotations

import torch
from rlo_core import create_loss, set_progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

WRONG, EPOCHS, SEEDS = 0.4, 40, (0, 1, 2)


def train(spec: str, x: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Return a network trained on `labels` under the loss `spec`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    criterion = create_loss(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(EPOCHS):
        set_progress(criterion, epoch / EPOCHS)
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            criterion(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def main() -> None:
    """Print test accuracy and confidence under both losses."""
    torch.set_num_threads(1)  # small networks do not gain from more
    images, truth = load_digits(return_X_y=True)
    x, x_test, y, y_test = (
        torch.as_tensor(part)
        for part in train_test_split(images / 16.0, truth, test_size=0.3, random_state=0)
    )
    x, x_test = x.float(), x_test.float()
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=generator) < WRONG
    shift = torch.randint(1, 10, (len(y),), generator=generator)
    noisy = torch.where(wrong, (y + shift) % 10, y)

    print(f"{int(wrong.sum())} of {len(y)} training labels are wrong")
    for spec in ("ce", "rlo:k=2"):
        scores, sure = [], []
        for seed in SEEDS:
            p = train(spec, x, noisy, seed)(x_test).softmax(1).detach()
            scores.append((p.argmax(1) == y_test).float().mean().item())
            sure.append(p.max(1).values.mean().item())
        accuracy, confidence = sum(scores) / len(scores), sum(sure) / len(sure)
        print(f"{spec:8} accuracy on clean test labels {accuracy:.1%}, confidence {confidence:.1%}")


if __name__ == "__main__":
    main()
