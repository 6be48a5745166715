"""A task: the model NewTask and its data NewTaskData.

lightning fit --model=new_task.NewTask --data=new_task.NewTaskData --trainer.max_epochs=20
lightning test --ckpt_path=last --trust=new_task

Replace the points by your data, the network by yours, and the loss by yours. Callbacks and
strategies need no line here: add --trainer.callbacks+=EMA or --trainer.strategy=zero3 to the
command.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ravine.lightning_modules import TaskModule


class NewTask(TaskModule):
    """Classify points of the plane (b 2) as inside (1) or outside (0) of a circle (b).

    Args:
        hidden_size: number of hidden units.
    """

    lr = 1e-2  # of the default optimizer, AdamW; a callback such as OptimizerPlan has its own

    def __init__(self, hidden_size: int = 32) -> None:
        """Store the arguments; checkpoints contain them."""
        super().__init__()
        self.save_hyperparameters()
        self.hidden_size = hidden_size

    def build_net(self) -> nn.Module:
        """Return the network for one device: points (b 2) to logits (b 1)."""
        return nn.Sequential(
            nn.Linear(2, self.hidden_size), nn.ReLU(), nn.Linear(self.hidden_size, 1)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch: points (b 2) and labels (b)."""
        loss, _ = self.loss_and_accuracy(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log loss and accuracy of a validation batch."""
        self.log_evaluation("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log loss and accuracy of a test batch."""
        self.log_evaluation("test", batch)

    def loss_and_accuracy(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and accuracy, both means over the batch."""
        points, labels = batch
        logits = self(points).squeeze(1)  # (b)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss, ((logits > 0) == (labels > 0.5)).float().mean()

    def log_evaluation(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and accuracy, averaged over all samples on any number of ranks."""
        loss, accuracy = self.loss_and_accuracy(batch)
        size = len(batch[0])
        self.log(f"{stage}/loss", loss, batch_size=size, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, batch_size=size, sync_dist=True, prog_bar=True)


class NewTaskData(L.LightningDataModule):
    """Random points in the square from -1 to 1; the label is 1 inside a circle of radius 0.7.

    Args:
        batch_size: points of a batch.
        num_points: number of points; a fifth is for validation, a fifth for the test.
        seed: seed of the points.
    """

    def __init__(self, batch_size: int = 64, num_points: int = 1000, seed: int = 0) -> None:
        """Store the arguments."""
        super().__init__()
        self.batch_size, self.num_points, self.seed = batch_size, num_points, seed

    def setup(self, stage: str) -> None:
        """Make the points and split them."""
        generator = torch.Generator().manual_seed(self.seed)
        points = 2 * torch.rand(self.num_points, 2, generator=generator) - 1
        labels = (points.norm(dim=1) < 0.7).float()
        size = self.num_points // 5
        self.val_set = TensorDataset(points[:size], labels[:size])
        self.test_set = TensorDataset(points[size : 2 * size], labels[size : 2 * size])
        self.train_set = TensorDataset(points[2 * size :], labels[2 * size :])

    def train_dataloader(self) -> DataLoader:
        """Return the training points in random order."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation points."""
        return DataLoader(self.val_set, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test points."""
        return DataLoader(self.test_set, self.batch_size)
